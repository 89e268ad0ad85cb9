"""What the parts of gpu.py share: the setting, the outcome of a probe, the models, and how tensors are compared.

A probe is a function of the setting. It returns an Outcome, or raises SkippedError if it cannot run.
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
        device: Torch device.
        is_toy: Whether the models are tiny, so that everything takes seconds on a CPU.
        has_children: Whether probes may start processes, each of which takes seconds to import torch.
        seconds: How long the probe may take.
        figures: Where a probe stores intermediate results, so that they are kept if the rest fails.
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
        """Returns one of two values, depending on the size."""
        return toy if self.is_toy else full

    def sizes(self, name: str = "124m") -> dict[str, int]:
        """Returns the sizes of a model by name, or those of the toy."""
        return SIZES["toy" if self.is_toy else name]

    def synchronize(self) -> None:
        """Waits until a GPU has finished its work."""
        synchronize(self.device)


@dataclass(frozen=True)
class Outcome:
    """The result of a probe.

    Args:
        is_true: Whether the claim is true.
        claim: The claim, in words.
        figures: Numbers, texts and booleans by name; the setting's are added.
    """

    is_true: bool
    claim: str
    figures: dict[str, Any] = field(default_factory=dict)


class SkippedError(Exception):
    """Raised with the reason why a probe cannot run."""


Probe = Callable[[Setting], Outcome]


def make_pair(setting: Setting, scale: float = 4.0, **changes: Any) -> tuple[NanoGPTLMHeadModel, nn.Module]:
    """Makes our model and the reference with the same random weights on the device, in train mode.

    Args:
        setting: Where the probes run.
        scale: Factor of all matrices. With 4 the logits are far apart, so that a fault shows; 1 is nanoGPT's init.
        **changes: Sizes that replace those of the 124M model or the toy, `dropout` and `bias`.
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
    """Calls a function of the setting in its own process, which is stopped when it takes too long."""
    return run_in_child(_call_in_time, function, setting, *args)


def _call_in_time(function: Callable[..., Any], setting: Setting, *args: Any) -> Any:
    if hasattr(signal, "alarm"):
        signal.alarm(max(1, int(setting.seconds)))
    return function(setting, *args)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Makes torch use only deterministic algorithms."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def measure_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest difference, relative to the largest expected number; NaN if one of them has a NaN."""
    difference = (found.detach().float() - expected.detach().float()).abs().max()
    return float(difference / expected.detach().float().abs().max().clamp(min=1e-30))


def measure_differences(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """Returns the largest of the differences of tensors of the same names; NaN if any is."""
    assert found.keys() == expected.keys()
    return float(torch.tensor([measure_difference(found[name], expected[name]) for name in expected]).max())
