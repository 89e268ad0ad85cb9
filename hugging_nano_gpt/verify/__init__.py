"""Proving that two models are the same: by their tensors, bit for bit, and by what they compute.

report.py holds what is found, sides.py loads the models, computing.py computes, compare.py
compares, nanogpt.py lets a user's own nanoGPT compute the other side, loss.py measures a
checkpoint's best_val_loss again. evaluate.py tells the loss of one model over all of a text;
estimate.py is what both measure with.
"""

from .evaluate import Evaluation, evaluate_loss
from .loss import verify_loss
from .models import verify_models
from .nanogpt import verify_against_nanogpt
from .report import Check, VerifyReport

__all__ = [
    "Check",
    "Evaluation",
    "VerifyReport",
    "evaluate_loss",
    "verify_against_nanogpt",
    "verify_loss",
    "verify_models",
]
