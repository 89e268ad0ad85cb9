"""Text as nanoGPT's sample.py draws it, token by token with its probabilities, and a local page that shows it."""
