"""Proofs that two models are the same: by their tensors, bit for bit, and by what they compute from the same batches.

models.py verifies two models, nanogpt.py a model against a checkout of nanoGPT. Both load models with sides.py,
compute with computing.py, compare with compare.py, and return the report of report.py.
"""

from .models import verify_models
from .nanogpt import verify_against_nanogpt
from .report import Check, VerifyReport

__all__ = ["Check", "VerifyReport", "verify_against_nanogpt", "verify_models"]
