"""What the parts of gpu.py share: where they run, what a probe returns, the models, and how tensors are compared.

A probe is a function of the setting. It returns an Outcome, or raises SkippedError where there is nothing to try.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from common import import_reference, run_in_child, synchronize
from torch import nn

from hugging_nano_gpt import NanoGPTConfig, NanoGPTLMHeadModel

ReferenceGPT = import_reference()

SIZES: dict[str, dict[str, int]] = {
    "124m": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304},
    "shakespeare": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65},
    "toy": {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 65},
}


@dataclass(frozen=True)
class Setting:
    """Where the probes run.

    Args:
        device: Device of torch.
        is_toy: Whether the models are tiny, so that all of it takes seconds on a CPU.
        has_children: Whether probes may start processes of their own, of which each takes seconds to import torch.
        seconds: How long the probe may take.
        figures: Where a probe puts what it finds on the way, so that it is not lost if the rest fails.
    """

    device: str
    is_toy: bool
    has_children: bool = True
    seconds: float = 60.0
    figures: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def is_cuda(self) -> bool:
        """Whether this is a CUDA device."""
        return torch.device(self.device).type == "cuda"

    def choose(self, full: Any, toy: Any) -> Any:
        """Returns the one or the other, by size."""
        return toy if self.is_toy else full

    def sizes(self, name: str = "124m") -> dict[str, int]:
        """Returns the sizes of a model by name, or the toy's."""
        return SIZES["toy" if self.is_toy else name]

    def synchronize(self) -> None:
        """Waits until a GPU has done what it was given."""
        synchronize(self.device)


@dataclass(frozen=True)
class Outcome:
    """What a probe found.

    Args:
        holds: Whether the claim holds.
        claim: What was to be shown, in words.
        figures: Numbers, words and truths by name; the setting's are added.
    """

    holds: bool
    claim: str
    figures: dict[str, Any] = field(default_factory=dict)


class SkippedError(Exception):
    """Says why there is nothing to try."""


Probe = Callable[[Setting], Outcome]


def make_pair(setting: Setting, scale: float = 4.0, **changes: Any) -> tuple[NanoGPTLMHeadModel, nn.Module]:
    """Makes our model and the reference with the same random weights on the device, in train mode.

    Args:
        setting: Where.
        scale: Of all matrices. With 4 a fault shows, as logits are far apart; with 1 they are nanoGPT's to train.
        **changes: Sizes in place of the 124M model's or the toy's, `dropout` and `bias`.
    """
    sizes = {**setting.sizes(), "dropout": 0.0, "bias": False, **changes}
    torch.manual_seed(1337)
    with torch.device(setting.device):
        ours, reference = make_ours(sizes), ReferenceGPT(**sizes)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(scale)
    reference.load_state_dict(ours.state_dict())
    return ours.train(), reference.train()


def make_ours(sizes: Mapping[str, Any]) -> NanoGPTLMHeadModel:
    """Makes our model as nanoGPT initialises it."""
    return NanoGPTLMHeadModel(NanoGPTConfig(**sizes))


def make_batch(setting: Setting, batch: int, length: int, vocab_size: int, seed: int = 1) -> tuple[torch.Tensor, ...]:
    """Makes random idx and targets, (batch, length) int64 each, on the device."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (batch, length + 1), generator=generator).to(setting.device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def run_apart(function: Callable[..., Any], setting: Setting, *args: Any) -> Any:
    """Calls a function of the setting in a process of its own, which the system ends when it takes too long."""
    return run_in_child(_call_in_time, function, setting, *args)


def _call_in_time(function: Callable[..., Any], setting: Setting, *args: Any) -> Any:
    if hasattr(signal, "alarm"):
        signal.alarm(max(1, int(setting.seconds)))
    return function(setting, *args)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Lets torch use deterministic algorithms only."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def measure_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest difference in units of the largest expected number; NaN if either has one."""
    difference = (found.detach().float() - expected.detach().float()).abs().max()
    return float(difference / expected.detach().float().abs().max().clamp(min=1e-30))


def measure_differences(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """Returns the largest of the differences of tensors of the same names; NaN if any is."""
    assert found.keys() == expected.keys()
    return float(torch.tensor([measure_difference(found[name], expected[name]) for name in expected]).max())
