"""GGUF files: toy models to export, faults to put into the export, and what a file contains."""

import re

import pytest
import torch

from hugging_nano_gpt import NanoGPTConfig, NanoGPTLMHeadModel, export_gguf
from hugging_nano_gpt.export import gguf as module

from .tiny import MODEL_ARGS, make_model

gguf = pytest.importorskip("gguf")


def make_kind(*, is_tied=True, activation_function="gelu_new", **model_args) -> NanoGPTLMHeadModel:
    """Makes a toy model; with the tanh GELU, so that the export keeps everything."""
    args = MODEL_ARGS | model_args
    config = NanoGPTConfig(**args, tie_word_embeddings=is_tied, activation_function=activation_function)
    model = NanoGPTLMHeadModel(config).eval()
    model.load_state_dict(make_model(**args).state_dict())
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)  # of both where they are tied
    return model


def export_and_read(model, path, **kwargs):
    export_gguf(model, path, **kwargs)
    return gguf.GGUFReader(path)


def read_metadata(reader) -> dict:
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def spoil_tensors(monkeypatch, fault):
    """Makes the next exports swap two layers, or transpose a weight whose shape does not show it."""

    def spoil(*args):
        tensors = select(*args)
        first, second = (f"transformer.h.{layer}.attn.c_proj.weight" for layer in (0, 1))
        swapped = {first: tensors[second], second: tensors[first]}
        return tensors | (swapped if fault == "swapped" else {first: tensors[first].t().contiguous()})

    select = module.select_tensors
    monkeypatch.setattr(module, "select_tensors", spoil)


def read_gelu_note(lost) -> list[float]:
    """Reads the length, the logit difference and the two perplexities in what an export says it does not keep."""
    notes = [sentence for sentence in lost if "GELU becomes" in sentence]
    pattern = r".* on (\d+) tokens .* up to ([\d.e+-]+), and the perplexity is ([\d.]+) instead of ([\d.]+)"
    return [float(number) for note in notes for number in re.fullmatch(pattern, note).groups()]


# Printable, control, of two to four bytes in UTF-8, and characters that some tokenizers of llama.cpp treat specially.
UNICODE = "\n !'aceo\\\t\r\x00\x7f\xe9\xfc\u0416\u0120\u0301\u2581\u4e2d\u6587\ufeff\u200d\U0001f642"
