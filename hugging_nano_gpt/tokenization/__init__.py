"""nanoGPT's characters and tiktoken's byte pairs as Transformers tokenizers, and back."""
