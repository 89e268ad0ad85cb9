"""Compares two models: their configs, their tensors bit by bit, and the numbers that they compute.

Mismatches of a known kind are named: swapped layers or tensors, a transposed matrix, an untied head. Bits are
compared, not values: 0.0 is not -0.0, and one NaN is not another.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import combinations

import torch

from ..errors import join_some, list_some
from ..model.configuration_nano_gpt import NanoGPTConfig
from .computing import have_same_bits, view_bits
from .report import Check
from .sides import Side

# Without dropout, which acts in training only, and which nanoGPT takes from the command line.
_SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")
_LAYER = re.compile(r"(transformer\.h\.\d+)\.(.+)")

Tensors = Mapping[str, torch.Tensor]


def compare_models(left: Side, right: Side) -> list[Check]:
    """Compares the configs, the tying, and every tensor of two models."""
    ours, theirs = left.model.state_dict(), right.model.state_dict()
    common = [name for name in ours if name in theirs]
    if left.is_tied and right.is_tied:
        common.remove("lm_head.weight")  # the same tensor as transformer.wte.weight
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
        reason = "it has the embedding's numbers, but the two would train apart"
    else:
        reason = f"{describe_difference(head, embedding)} (head and embedding)"
    return Check("tying", False, f"only on the {name} lm_head is untied, a matrix of its own: {reason}")


def _compare_names(left: Tensors, right: Tensors) -> Check:
    faults = list_unshared([name for name in left if name not in right], [name for name in right if name not in left])
    return Check("names", not faults, "; ".join(faults) or f"the same {len(left)} names")


def list_unshared(only_left: list[str], only_right: list[str]) -> list[str]:
    """Describes the names that only one side has, in one sentence for each side."""
    names = {"left": only_left, "right": only_right}
    return [f"only on the {side}: {list_some(names[side])}" for side in names if names[side]]


def _compare_dtypes(left: Tensors, right: Tensors, names: list[str]) -> Check:
    dtypes = [sorted({str(side[name].dtype).removeprefix("torch.") for name in names}) for side in (left, right)]
    different = [name for name in names if left[name].dtype != right[name].dtype]
    if not different:
        return Check("dtypes", True, ", ".join(dtypes[0]))
    texts = " and ".join("/".join(found) for found in dtypes)
    return Check("dtypes", False, f"{texts}; {_compare_converted(left, right, different)}")


def _compare_converted(left: Tensors, right: Tensors, names: list[str]) -> str:
    """Says whether tensors of different dtypes are equal after a conversion to the same dtype."""
    pairs = [(left[name], right[name]) for name in names if left[name].shape == right[name].shape]
    if not pairs:
        return "their shapes differ too"
    if all(torch.equal(one.double(), other.double()) for one, other in pairs):
        return "as numbers they are equal"  # float64 represents every number of the other dtypes
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
    """Describes every tensor that differs, alone or as part of a swap."""
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
    """Finds the layers that have another index on the right; returns sentences, and the names of their tensors."""
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


def compare_numbers(left: Tensors, right: Tensors, relative_tolerance: float = 0.0) -> list[Check]:
    """Compares what compute_numbers computed from the same batches.

    Args:
        left, right: The numbers by name, computed by models with the same vocab_size.
        relative_tolerance: As in compare_pair. For gradients it is ten times as large: they accumulate the rounding of
            two passes, and a wrong gradient is wrong by far more.
    """
    checks = []
    for name in left:
        kind, _, size = name.partition("/")
        if kind in ("logits", "loss"):
            checks.append(compare_pair(f"{kind} {size}", left[name], right[name], relative_tolerance))
    if any(name.startswith("gradient/") for name in left):
        checks.append(_compare_gradients(left, right, 10 * relative_tolerance))
    checks.append(_compare_tokens("greedy tokens", left["tokens"], right["tokens"]))
    sides = {"left": left, "right": right}
    return [*checks, *(_compare_cached(name, side) for name, side in sides.items() if "cached tokens" in side)]


def compare_pair(name: str, left: torch.Tensor, right: torch.Tensor, relative_tolerance: float) -> Check:
    """Compares two tensors.

    Args:
        name: Name of the check.
        left, right: The tensors.
        relative_tolerance: Largest difference accepted, relative to the largest magnitude on the left; 0.0 requires
            the same bits.
    """
    if have_same_bits(left, right):
        value = f": {left.item():.4f}" if left.ndim == 0 else ""
        return Check(name, True, f"bitwise equal{value}", 0.0, 0.0)
    if left.shape != right.shape:
        return Check(name, False, f"shape {tuple(left.shape)} and {tuple(right.shape)}")
    difference = measure_difference(left, right)
    tolerance = relative_tolerance * float(left.abs().max())
    if difference <= tolerance:
        detail = f"equal within {tolerance:.2g} (largest difference {difference:.2g})"
        return Check(name, True, detail, difference, tolerance)
    accepted = f"at most {tolerance:.2g} accepted" if relative_tolerance else "the same bits expected"
    where = f"; {describe_difference(left, right)}" if left.dtype == right.dtype else ""
    return Check(name, False, f"largest difference {difference:.2g}, {accepted}{where}", difference, tolerance)


def _compare_gradients(left: Tensors, right: Tensors, relative_tolerance: float) -> Check:
    ours, theirs = (
        {name.removeprefix("gradient/"): tensor for name, tensor in side.items() if name.startswith("gradient/")}
        for side in (left, right)
    )
    checks = [compare_pair(name, ours[name], theirs[name], relative_tolerance) for name in ours if name in theirs]
    unshared = sorted(ours.keys() ^ theirs.keys())
    faults = [f"only on one side: {list_some(unshared)}"] if unshared else []
    faults += [f"{check.name}: {check.detail}" for check in checks if not check.is_equal]
    largest = max((check.largest_difference or 0.0 for check in checks), default=None)
    tolerance = max((check.tolerance or 0.0 for check in checks), default=None)
    if faults:
        return Check("gradients", False, join_some(faults), largest, tolerance)
    bitwise = all(check.detail.startswith("bitwise equal") for check in checks)
    detail = "bitwise equal" if bitwise else f"equal within {tolerance:.2g} (largest difference {largest:.2g})"
    return Check("gradients", True, f"{len(checks)} tensors, {detail}", largest, tolerance)


def _compare_tokens(name: str, left: torch.Tensor, right: torch.Tensor) -> Check:
    n_rows, n_tokens = left.shape
    if torch.equal(left, right):
        return Check(name, True, f"{n_rows} rows of {n_tokens} tokens equal")
    row, column = (int(i) for i in (left != right).nonzero()[0])
    detail = f"row {row} differs from token {column} on: {int(left[row, column])} and {int(right[row, column])}"
    return Check(name, False, detail)


def _compare_cached(name: str, side: Tensors) -> Check:
    """Compares the tokens that a side generates with a cache with those that it generates without one.

    With a cache, sums are taken in another order, so the two may differ after a tie: a token where the best logit
    leads by less than 6e-6 (float32), 5e-3 (float16) or 3e-2 (bfloat16) of the largest logit. The demo model's float32
    logits, of size 14, differ by at most 3.3e-5 with and without a cache.
    """
    cached, tokens = side["cached tokens"], side["tokens"]
    check = _compare_tokens(f"cached, {name}", cached, tokens)
    precision = next(torch.finfo(t.dtype).eps for key, t in side.items() if key.startswith("logits/")) ** 0.75
    ties = []
    for row in (cached != tokens).any(-1).nonzero()[:, 0].tolist():
        column = int((cached[row] != tokens[row]).nonzero()[0])
        if side["margins"][row, column] > precision:
            return replace(
                check, detail=f"{check.detail}; with a cache the {name} side generates other tokens than without"
            )
        ties.append(f"row {row} up to a tie at token {column}")
    return replace(check, is_equal=True, detail=f"equal: {', '.join(ties)}") if ties else check


def measure_difference(left: torch.Tensor, right: torch.Tensor) -> float:
    """Returns the largest difference of two tensors of the same shape, infinite if only one is NaN or infinite."""
    return float(_subtract(left, right).max()) if left.numel() else 0.0


def describe_difference(left: torch.Tensor, right: torch.Tensor) -> str:
    """Says how many numbers of two tensors of the same shape and dtype differ, and shows the two furthest apart."""
    is_other = view_bits(left) != view_bits(right)
    # If all differences are 0, as between -0.0 and 0.0, this is the first pair with other bits.
    furthest = torch.where(is_other, _subtract(left, right), -1.0).argmax()
    index = [int(i) for i in torch.unravel_index(furthest, left.shape)]
    values = _describe_pair(left[tuple(index)], right[tuple(index)])
    return f"{int(is_other.sum()):,} of {left.numel():,} numbers differ, most at {index}: {values}"


def _subtract(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    left, right = (t.detach() if t.dtype == torch.float64 else t.detach().float() for t in (left, right))
    difference = (left - right).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    return difference.masked_fill_((left == right) | (left.isnan() & right.isnan()), 0.0)


def _describe_pair(left: torch.Tensor, right: torch.Tensor) -> str:
    texts = [f"{number.item():.9g}" for number in (left, right)]
    if texts[0] == texts[1]:
        mask = 2 ** (8 * left.element_size()) - 1
        texts = [f"{text} ({int(view_bits(n)) & mask:#x})" for text, n in zip(texts, (left, right), strict=True)]
    return " and ".join(texts)
