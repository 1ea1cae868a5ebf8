"""What serve.py hands to a browser and to other tools. It needs the web packages (`pip install -e .[serve]`).

    app.py     the application: routes, static files, who may ask (Host, Origin, token), sizes, errors as JSON
    runs.py    runs under the folders: found, followed as they grow, thinned; running, finished, stopped or died
    static/    the page: index.html, style.css, modules of JavaScript; nothing is built, nothing comes from elsewhere
"""
