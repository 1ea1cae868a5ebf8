"""What a browser and other tools get from the server. It needs the extra `serve` of pyproject.toml.

    app.py            the application: routes, static files, who may ask (Host, Origin, token), sizes, errors as JSON
    bodies.py         what a client posts -> dataclasses; exceptions -> answers
    runs.py           runs under the folders: found, followed as they grow; running, finished, stopped or died
    curves.py         a run's records as curves of bounded length
    engine.py         the models that can be chosen, and the one thread that runs them
    loaded.py         a model in memory: text, scores, attention, neighbors; the only module that imports torch
    writing.py        text as it is written, token by token, with its candidates
    introspection.py  what a model computes for a prompt: tokens, attention, nearest embeddings
    openai_api.py     OpenAI's /v1/models and /v1/completions
    static/           the page: HTML, CSS, modules of JavaScript; nothing is built, nothing comes from elsewhere
"""
