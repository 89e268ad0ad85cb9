"""A model's mean loss over every token of a text, its perplexity, and its bits per byte or character.

Every token is scored once. The first window scores all of its tokens. Each later window starts `stride` tokens further
on and scores that many, with the tokens before them as context: a shorter stride gives more context and takes longer.
nanoGPT's own estimate is reported too: a mean over random windows, with its standard error.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import default_collate
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..checkpoint.contents import NO_VAL_LOSS, TrainingState
from ..convert.inspect import to_json
from ..convert.source import Source, choose_device, load_source
from ..data.dataset import TokenDataset
from ..data.shards import TOKEN_SUFFIXES, find_split
from ..errors import DataError
from ..model.modeling_nano_gpt import NanoGPTLMHeadModel
from ..tokenization.text import count_units, encode_text, read_text
from ..tokenization.vocabulary import make_generation_config
from .estimate import Estimate, compute_losses, estimate_loss, get_estimate_settings

# Windows in one batch; compute_losses splits it where its logits are large.
_N_ROWS = 16


@dataclass(frozen=True)
class Evaluation:
    """A model's loss over all of a text.

    Args:
        source: What was evaluated, in words.
        data: The file.
        stride: Number of tokens that each window scores, except the first.
        n_tokens: Number of tokens scored.
        loss: Their mean loss, in nats per token.
        unit: "byte" or "character"; None without a tokenizer.
        n_units: Number of UTF-8 bytes, or of characters, in the tokens scored, without special tokens.
        estimate: nanoGPT's estimate on the same file; None for a text.
        recorded: The run whose best_val_loss the estimate is compared with; None if nothing can be compared.
        notes: What was assumed, and why a number is missing, a sentence each.
    """

    source: str
    data: str
    stride: int
    n_tokens: int
    loss: float
    unit: str | None
    n_units: int
    estimate: Estimate | None
    recorded: TrainingState | None
    notes: tuple[str, ...]

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return torch.tensor(self.loss, dtype=torch.float64).exp().item()  # infinite where math.exp would raise

    @property
    def bits_per_unit(self) -> float | None:
        """Bits per byte or per character; None without a tokenizer."""
        return self.loss * self.n_tokens / math.log(2) / self.n_units if self.n_units else None

    @property
    def matches_recorded(self) -> bool | None:
        """Whether the estimate agrees with the run's best_val_loss; None if nothing can be compared."""
        return None if self.estimate is None or self.recorded is None else self.estimate.agrees(self.recorded)

    def __str__(self) -> str:
        facts = {
            "loss": f"{self.loss:.6f} nats a token, over {self.n_tokens:,} tokens with stride {self.stride}",
            "perplexity": f"{self.perplexity:.4f}",
        }
        if self.bits_per_unit is not None:
            facts[f"bits per {self.unit}"] = f"{self.bits_per_unit:.4f}, over {self.n_units:,} {self.unit}s"
        if self.estimate is not None:
            facts["estimate"] = f"{self.estimate} over {self.estimate.n:,} random windows, as nanoGPT's"
            if self.recorded is not None:
                facts["estimate"] += f"; {self.estimate.compare(self.recorded)}"
        width = max(map(len, facts))
        lines = [f"{name:<{width}}  {value}" for name, value in facts.items()]
        return "\n".join([f"{self.source} on {self.data}", *lines, *(f"note: {note}" for note in self.notes)])

    def to_json(self) -> dict[str, Any]:
        """Returns the same facts as a dict for json.dumps."""
        facts = {
            "source": self.source,
            "data": self.data,
            "loss": self.loss,
            "perplexity": self.perplexity,
            **({f"bits_per_{self.unit}": self.bits_per_unit} if self.unit else {}),
            "n_tokens": self.n_tokens,
            "stride": self.stride,
            "estimate": None if self.estimate is None else self.estimate.to_json(self.recorded),
            "notes": self.notes,
        }
        return to_json(facts)


def evaluate_loss(
    source: str | os.PathLike[str],
    data_path: str | os.PathLike[str],
    *,
    stride: int | None = None,
    eval_iters: int | None = None,
    device: str | None = None,
    **kwargs: Any,
) -> Evaluation:
    """Computes a model's mean loss over a whole token file or text, and nanoGPT's estimate of it for a token file.

    The token that generate starts with is put before a text, so that the first token of the text is scored too. The
    first token of a token file is only context. Logits are computed in the model's dtype, losses in float32 and their
    mean in float64. On a val.bin, the estimate is compared with the best_val_loss that the run recorded: both are
    means over random windows, and agree if they are within three standard errors of their difference.

    Args:
        source: What load_source takes: a checkpoint file, a saved folder or a Hub id.
        data_path: A .bin or .npy file of tokens or a pattern of shards, a folder with val.bin or val_*.bin, or a UTF-8
            text under any other name.
        stride: Number of tokens from one window to the next, 1 to block_size; block_size by default.
        eval_iters: Number of batches for nanoGPT's estimate, instead of the checkpoint's.
        device: Device of torch; by default CUDA if there is a GPU for it, else the CPU.
        **kwargs: What load_source takes (convert/source.py), such as `meta_path`, `tokenizer`, `dtype`, `revision`.

    Raises:
        DeviceError: If torch cannot compute on the device.
        CheckpointError: If the model cannot be loaded.
        DataError: If the data cannot be read, have nothing to score, or have tokens that the model does not have; if
            the stride is out of range, or eval_iters is given for a text.
        TokenizerError: If a text has no tokenizer, or characters that the tokenizer does not know.
    """
    is_folder = Path(data_path).is_dir()
    path = find_split(Path(data_path), "val") if is_folder else Path(data_path)
    if eval_iters is not None and path.suffix not in TOKEN_SUFFIXES:
        raise DataError(f"{path}: expected no eval_iters for a text, got {eval_iters}; leave out --eval-iters")
    loaded = load_source(source, device=choose_device(device), attn_implementation="sdpa", **kwargs)
    model = loaded.model
    stride = model.config.block_size if stride is None else stride
    if not 1 <= stride <= model.config.block_size:
        raise DataError(f"stride: expected 1 to block_size={model.config.block_size}, got {stride}; change --stride")
    windows, own_tokenizer, reasons = _open_windows(loaded, path)
    loss, scored = _score(model, windows, stride, path)
    unit, n_units = (None, 0) if own_tokenizer is None else count_units(own_tokenizer, scored)
    estimate, recorded = None, None
    if path.suffix in TOKEN_SUFFIXES:
        state = model.nanogpt_training_state
        recorded_iters, batch_size = get_estimate_settings(state)
        estimate = estimate_loss(model, path, n_batches=eval_iters or recorded_iters, batch_size=batch_size)
        if is_folder or path.name in ("val.bin", "val_*.bin"):
            recorded = state if state.best_val_loss < NO_VAL_LOSS else None
            reasons += [] if recorded else ["the estimate is not compared, because no best_val_loss is recorded"]
    return Evaluation(
        source=f"{os.fspath(source)} ({loaded.kind})",
        data=str(path),
        stride=stride,
        n_tokens=len(scored),
        loss=loss,
        unit=unit,
        n_units=n_units,
        estimate=estimate,
        recorded=recorded,
        notes=(*loaded.notes, *reasons),
    )


class _Windows(Protocol):
    """What TokenDataset provides: item i is the window that starts at token i, with its targets."""

    block_size: int

    def __len__(self) -> int: ...
    def __getitem__(self, offset: int) -> Mapping[str, torch.Tensor]: ...


class _TextWindows:
    """The windows of a text, which may be shorter than block_size."""

    def __init__(self, ids: list[int], block_size: int):
        self._ids = torch.tensor(ids)
        self.block_size = min(block_size, len(ids) - 1)

    def __len__(self) -> int:
        return len(self._ids) - self.block_size

    def __getitem__(self, offset: int) -> dict[str, torch.Tensor]:
        window = self._ids[offset : offset + self.block_size + 1]
        return {"input_ids": window[:-1], "shift_labels": window[1:]}


def _open_windows(loaded: Source, path: Path) -> tuple[_Windows, PreTrainedTokenizerBase | None, list[str]]:
    """Returns the windows of a file, the tokenizer of its tokens, and otherwise the reason for not having one."""
    block_size = loaded.model.config.block_size
    if path.suffix in TOKEN_SUFFIXES:
        windows = TokenDataset(path, block_size)
        tokenizer, reasons = loaded.find_tokenizer()
        return windows, tokenizer, [f"no bits per byte or character: {reason}" for reason in reasons]
    text = read_text(path)
    tokenizer = loaded.tokenizer
    start = make_generation_config(loaded.model, tokenizer).bos_token_id
    ids = [*([] if start is None else [start]), *encode_text(tokenizer, text, path)]
    if len(ids) < 2:
        raise DataError(f"{path}: nothing to score: expected two tokens or more, got {len(ids)}; give a longer text")
    return _TextWindows(ids, block_size), tokenizer, []


def _score(model: NanoGPTLMHeadModel, windows: _Windows, stride: int, path: Path) -> tuple[float, list[int]]:
    """Returns the mean loss of all tokens but the first, and these tokens."""
    begins = [*range(0, len(windows) - 1, stride), len(windows) - 1]
    counts = [windows.block_size, *(end - begin for begin, end in pairwise(begins))]
    total, scored = 0.0, []
    with logging.tqdm(total=len(begins), desc="loss", unit="window") as bar:
        for first in range(0, len(begins), _N_ROWS):
            rows = slice(first, first + _N_ROWS)
            batch = default_collate([windows[begin] for begin in begins[rows]])
            losses = compute_losses(model, batch, path)  # (B, T)
            for count, row, targets in zip(counts[rows], losses, batch["shift_labels"], strict=True):
                total += row[-count:].sum().item()
                scored += targets[-count:].tolist()
            bar.update(len(losses))
    return total / len(scored), scored
