"""Comparing what two models are: their settings, and their tensors by name, dtype and bit.

A mismatch is named as what it is where that can be told: layers or tensors swapped, a matrix transposed, a head of its
own.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import combinations

import torch

from ..configuration_nano_gpt import NanoGPTConfig
from ..formats.check import join_some, list_some
from .bits import describe_difference, have_same_bits, measure_difference
from .report import Check
from .sides import Side

# dropout is no part of it: it acts in training only, where nanoGPT takes it from the command line.
_SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")
_LAYER = re.compile(r"(transformer\.h\.\d+)\.(.+)")

Tensors = Mapping[str, torch.Tensor]


def compare_models(left: Side, right: Side) -> list[Check]:
    """Compares settings, tying, and every tensor of two models."""
    ours, theirs = left.model.state_dict(), right.model.state_dict()
    common = [name for name in ours if name in theirs]
    if left.is_tied and right.is_tied:
        common.remove("lm_head.weight")  # the embedding again
    return [
        *_compare_configs(left.model.config, right.model.config),
        _compare_tying(left, right),
        _compare_names(ours, theirs),
        _compare_dtypes(ours, theirs, common),
        _compare_tensors(ours, theirs, common),
    ]


def _compare_configs(left: NanoGPTConfig, right: NanoGPTConfig) -> Iterator[Check]:
    values = {name: (getattr(left, name), getattr(right, name)) for name in _SIZES}
    different = [f"{name}: {one} and {other}" for name, (one, other) in values.items() if one != other]
    sizes = ", ".join(f"{name} {one}" for name, (one, _) in values.items())
    yield Check("sizes", not different, "; ".join(different) or sizes)
    one, other = left.activation_function, right.activation_function
    reason = (
        "one is exact, the other the tanh formula" if "gelu" in (one, other) else "one formula, rounded differently"
    )
    yield Check("activation", one == other, one if one == other else f"{one} and {other}: {reason}")


def _compare_tying(left: Side, right: Side) -> Check:
    if left.is_tied == right.is_tied:
        text = "lm_head is the token embedding" if left.is_tied else "lm_head is a matrix of its own"
        return Check("tying", True, text)
    name, side = ("left", left) if right.is_tied else ("right", right)
    head, embedding = side.model.lm_head.weight, side.model.transformer.wte.weight
    if have_same_bits(head, embedding):
        reason = "it holds the embedding's numbers, but the two would train apart"
    else:
        reason = f"{describe_difference(head, embedding)} (head and embedding)"
    return Check("tying", False, f"only on the {name} lm_head is untied, a matrix of its own: {reason}")


def _compare_names(left: Tensors, right: Tensors) -> Check:
    faults = [
        f"only on the {side}: {list_some(names)}"
        for side, names in (
            ("left", [name for name in left if name not in right]),
            ("right", [name for name in right if name not in left]),
        )
        if names
    ]
    return Check("names", not faults, "; ".join(faults) or f"the same {len(left)} names")


def _compare_dtypes(left: Tensors, right: Tensors, names: list[str]) -> Check:
    dtypes = [sorted({str(side[name].dtype).removeprefix("torch.") for name in names}) for side in (left, right)]
    different = [name for name in names if left[name].dtype != right[name].dtype]
    if not different:
        return Check("dtypes", True, ", ".join(dtypes[0]))
    texts = " and ".join("/".join(found) for found in dtypes)
    return Check("dtypes", False, f"{texts}; {_compare_converted(left, right, different)}")


def _compare_converted(left: Tensors, right: Tensors, names: list[str]) -> str:
    """Says whether tensors of different dtypes are equal once they have the same."""
    pairs = [(left[name], right[name]) for name in names if left[name].shape == right[name].shape]
    if not pairs:
        return "their shapes differ too"
    if all(torch.equal(one.double(), other.double()) for one, other in pairs):
        return "as numbers they are equal"  # float64 holds every number of the narrower ones
    narrow = min(
        (t.dtype for pair in pairs for t in pair), key=lambda dtype: (dtype.itemsize, -torch.finfo(dtype).eps)
    )
    name = str(narrow).removeprefix("torch.")
    if all(have_same_bits(one.to(narrow), other.to(narrow)) for one, other in pairs):
        return f"equal once rounded to {name}"
    return f"they differ even when rounded to {name}"


def _compare_tensors(left: Tensors, right: Tensors, names: list[str]) -> Check:
    shapes = [name for name in names if left[name].shape != right[name].shape]
    comparable = [name for name in names if name not in shapes and left[name].dtype == right[name].dtype]
    different = [name for name in comparable if not have_same_bits(left[name], right[name])]
    n_numbers = sum(left[name].numel() for name in comparable)
    n_other_dtypes = len(names) - len(shapes) - len(comparable)
    faults = [f"{name}: shape {tuple(left[name].shape)} and {tuple(right[name].shape)}" for name in shapes]
    if n_other_dtypes:
        faults.append(f"{n_other_dtypes} tensors not compared bit for bit, as their dtypes differ")
    faults += _explain(left, right, different)
    if faults:
        largest = max((measure_difference(left[name], right[name]) for name in different), default=None)
        return Check("tensors", False, join_some(faults), largest, 0.0)
    return Check("tensors", True, f"{len(comparable)} tensors, {n_numbers:,} numbers, bitwise equal", 0.0, 0.0)


def _explain(left: Tensors, right: Tensors, different: list[str]) -> list[str]:
    """Describes every tensor that differs, alone or as part of something larger."""
    sentences, explained = _find_moved_layers(left, right, different)
    rest = [name for name in different if name not in explained]
    for one, other in combinations(rest, 2):
        is_swap = have_same_bits(left[one], right[other]) and have_same_bits(left[other], right[one])
        if is_swap and not explained & {one, other}:
            sentences.append(f"{one} and {other} are swapped")
            explained |= {one, other}
    for name in rest:
        if name in explained:
            continue
        if left[name].ndim == 2 and have_same_bits(left[name].T, right[name]):
            sentences.append(f"{name} is transposed")
        else:
            sentences.append(f"{name}: {describe_difference(left[name], right[name])}")
    return sentences


def _find_moved_layers(left: Tensors, right: Tensors, different: list[str]) -> tuple[list[str], set[str]]:
    """Finds layers of the left that are whole another layer of the right; returns sentences and their tensors."""
    matches = [match for match in map(_LAYER.fullmatch, different) if match]
    affected = list(dict.fromkeys(match[1] for match in matches))  # in the model's order
    suffixes = [match[2] for match in map(_LAYER.fullmatch, left) if match and match[1] == "transformer.h.0"]
    moved: dict[str, str] = {}
    for one in affected:
        for other in affected:
            names = [(f"{one}.{suffix}", f"{other}.{suffix}") for suffix in suffixes]
            if one != other and all(b in right and have_same_bits(left[a], right[b]) for a, b in names):
                moved[one] = other
    sentences = []
    for one, other in moved.items():
        if moved.get(other) != one:
            sentences.append(f"{one} on the left is {other} on the right")
        elif affected.index(one) < affected.index(other):
            sentences.append(f"{one} and {other} are swapped")
    return sentences, {match[0] for match in matches if match[1] in moved}
