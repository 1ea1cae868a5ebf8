"""What the server hands to a browser and to other tools. It needs the web packages (`pip install -e .[serve]`).

    engine.py         the models that can be chosen, and the one thread that runs them
    loaded.py         a model in memory: text, scores, attention, neighbors; the only module that imports torch
    bodies.py         what a client posts -> dataclasses; exceptions -> answers
    writing.py        text as it is written, token by token, with its candidates
    introspection.py  what a model makes of a prompt: tokens, attention, nearest embeddings
    openai_api.py     OpenAI's /v1/models and /v1/completions
    static/           the page: HTML, CSS, modules of JavaScript; nothing is built, nothing comes from elsewhere
"""
