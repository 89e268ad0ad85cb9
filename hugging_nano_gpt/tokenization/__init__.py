"""nanoGPT's character tables and tiktoken's encodings as Transformers tokenizers, and back."""
