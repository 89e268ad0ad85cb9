"""The files that travel with saved models as remote code: they import only torch, transformers and each other."""
