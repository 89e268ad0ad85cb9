"""Text sampled as nanoGPT's sample.py does, token by token with probabilities, and a local page that shows it."""
