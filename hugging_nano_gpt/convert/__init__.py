"""What a user names becomes a model, and a model becomes a checkpoint, a folder or GPT-2."""
