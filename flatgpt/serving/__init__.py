"""What a browser and other tools get from the server. It needs the extra `serve` of pyproject.toml.

    app.py     the application: routes, static files, who may ask (Host, Origin, token), sizes, errors as JSON
    runs.py    runs under the folders: found, followed as they grow; running, finished, stopped or died
    curves.py  a run's records as curves of bounded length
    static/    the page: index.html, style.css, modules of JavaScript; nothing is built, nothing comes from elsewhere
"""
