"""A page in the browser to try a model in: server.py serves it, page.py builds it, markup.py draws its parts.

Gradio (the extra `playground`) is imported only when the page is made.
"""
