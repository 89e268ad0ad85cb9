"""What a user names becomes a model, and a model becomes a checkpoint, a folder or GPT-2.

The code in saved folders asks this package for the names below. They stay, however the files move.
"""

from .card import keep_card, write_card
from .live import share_model
from .nanogpt import load_model, read_training_state, save_model

__all__ = ["keep_card", "load_model", "read_training_state", "save_model", "share_model", "write_card"]
