"""From a text or documents to the token files that nanoGPT's train.py reads, as its prepare.py files make them."""
