"""A model served as OpenAI's API: completions and chats over HTTP, for a few users, on FastAPI and uvicorn."""
