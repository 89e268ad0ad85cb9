"""Checks which attention kernels run, and that padded and packed rows give the same numbers as alone."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import utils

from .probe import Outcome, Probe, Setting, SkippedError, make_batch, make_ours, make_pair

LIMIT_S = 60.0

# torch's own operators. "math" is the slow one, which has no kernel.
OPERATORS = ("aten::_scaled_dot_product_", "aten::_flash_attention", "aten::_efficient_attention", "aten::_cudnn_att")

KERNEL_WORDS = ("flash", "fmha", "sdpa")

# Norms relative to the expected logits' norm. bfloat16 has 8 bits; without its mask a row differs by several tenths.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def probe_kernels(setting: Setting) -> Outcome:
    """Records the operators and kernels that attention uses, in ours and in the reference."""
    ours, reference = make_pair(setting)
    idx, targets = make_batch(setting, 4, ours.config.block_size, ours.config.vocab_size)
    prompt = {"input_ids": idx[:, :8], "use_cache": True}
    figures = setting.figures
    figures |= {
        "ours, training": list_attention(setting, lambda: ours(idx, shift_labels=targets).loss.backward()),
        "reference, training": list_attention(setting, lambda: reference(idx, targets)[1].backward()),
    }
    ours.eval()
    with torch.no_grad():
        figures["ours, prompt with a cache"] = list_attention(setting, lambda: ours(**prompt))
        figures["ours, greedy tokens"] = list_attention(
            setting, lambda: ours.generate(idx[:, :8], max_new_tokens=4, do_sample=False)
        )
    is_fast = any("flash" in name or "cudnn" in name for name in figures["ours, training"])
    is_same = figures["ours, training"] == figures["reference, training"]
    return Outcome(is_fast and is_same, "a flash kernel in bfloat16, the same as the reference's")


def list_attention(setting: Setting, run: Callable[[], Any]) -> list[str]:
    """Returns the names of the attention operators and kernels that a call uses under bfloat16 autocast."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.is_cuda else [])]
    with torch.autocast(torch.device(setting.device).type, dtype=torch.bfloat16):
        run()  # keeps one-time loading and tuning out of the profile
        with profile(activities=activities) as profiled:
            run()
            setting.synchronize()
    events = profiled.key_averages()
    operators = {event.key for event in events if event.key.startswith(OPERATORS)}
    on_device = {event.key for event in events if event.device_type == DeviceType.CUDA}
    kernels = {name for name in on_device if any(word in name.lower() for word in KERNEL_WORDS)}
    return sorted(name[:90] for name in operators | kernels)


def probe_rows(setting: Setting, implementation: str, dtype: torch.dtype) -> Outcome:
    """Compares padded and packed rows with the same rows alone, and checks that without the mask they differ."""
    check_installed(setting, implementation)
    sizes = {**setting.sizes(), "n_layer": 2}
    torch.manual_seed(1337)
    plain = make_ours(sizes).to(setting.device, dtype).eval()
    for parameter in plain.parameters():
        if parameter.ndim >= 2:
            parameter.data.mul_(4)
    model = make_ours(sizes).to(setting.device, dtype).eval()
    model.load_state_dict(plain.state_dict())
    model.set_attn_implementation(implementation)
    block_size = plain.config.block_size
    rows = [make_batch(setting, 1, block_size // n, sizes["vocab_size"], seed=n)[0] for n in (2, 4, 8)]
    with torch.no_grad():
        expected = torch.cat([plain(row, use_cache=False).logits[0] for row in rows])
        padded, mask = pad_left(rows)
        figures = {
            "padded": measure_error(read_padded(model, padded, mask, use_mask=True), expected),
            "padded, without its mask": measure_error(read_padded(plain, padded, mask, use_mask=False), expected),
            "packed": measure_error(read_packed(model, rows, use_positions=True), expected),
            "packed, without its positions": measure_error(read_packed(plain, rows, use_positions=False), expected),
        }
    tolerance = TOLERANCES[dtype]
    is_true = figures["padded"] <= tolerance and figures["packed"] <= tolerance
    can_fail = min(figures["padded, without its mask"], figures["packed, without its positions"]) > 2 * tolerance
    dtype_name = str(dtype).removeprefix("torch.")
    return Outcome(is_true and can_fail, f"{implementation}, {dtype_name}: each row as it is alone", figures)


def check_installed(setting: Setting, implementation: str) -> None:
    """Raises SkippedError if an implementation cannot run."""
    if implementation == "flex_attention" and not setting.is_cuda:
        raise SkippedError("on a CPU flex attention compiles C++ for a minute")
    if implementation.startswith("flash"):
        is_available = getattr(utils, f"is_flash_attn_{implementation[-1]}_available", lambda: False)
        if not setting.is_cuda or not is_available():
            raise SkippedError(f"{implementation} is not installed")


def pad_left(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads rows (1, T) to one batch (B, longest T); returns the batch and its mask."""
    longest = max(row.shape[1] for row in rows)
    pad = torch.nn.functional.pad
    padded = torch.cat([pad(row, (longest - row.shape[1], 0), value=3) for row in rows])
    return padded, torch.cat([pad(torch.ones_like(row), (longest - row.shape[1], 0)) for row in rows])


def read_padded(model: Any, padded: torch.Tensor, mask: torch.Tensor, use_mask: bool) -> torch.Tensor:
    """Returns the logits of all tokens except the padding, row by row."""
    logits = model(padded, attention_mask=mask if use_mask else None, use_cache=False).logits
    return logits[mask.bool()]


def read_packed(model: Any, rows: list[torch.Tensor], use_positions: bool) -> torch.Tensor:
    """Returns the logits of all tokens of rows that are packed into one row."""
    positions = torch.cat([torch.arange(row.shape[1], device=row.device) for row in rows])[None]
    packed = torch.cat(rows, dim=1)
    return model(packed, position_ids=positions if use_positions else None, use_cache=False).logits[0]


def measure_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the norm of the difference, relative to the expected logits' norm."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


PROBES: dict[str, Probe] = {
    "kernels": probe_kernels,
    "sdpa": partial(probe_rows, implementation="sdpa", dtype=torch.float32),
    "eager": partial(probe_rows, implementation="eager", dtype=torch.float32),
    "flex_attention": partial(probe_rows, implementation="flex_attention", dtype=torch.float32),
    "flash_attention_2": partial(probe_rows, implementation="flash_attention_2", dtype=torch.bfloat16),
    "flash_attention_3": partial(probe_rows, implementation="flash_attention_3", dtype=torch.bfloat16),
}
