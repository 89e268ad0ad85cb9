"""The files that ship with saved folders, and nothing else: they import torch, transformers and each other."""
