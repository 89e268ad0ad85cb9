"""A picture of train and val loss, from what a run has left: log.jsonl, train.py's printed lines, or Trainer's state.

train.py (@ 3adf61e) prints "step N: train loss X, val loss Y" at an evaluation and "iter N: loss X, time ..." at an
update. It needs matplotlib, and no torch.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import list_some, require
from ..files.files import check_file, fail, open_atomically, open_source
from .log import LOG_NAME, parse_line
from .trainer_checkpoint import STATE_NAME, list_checkpoints

_NUMBER = r"(\d+\.\d+|nan|inf)"
_PRINTED_EVALUATION = re.compile(rf"step (\d+): train loss {_NUMBER}, val loss {_NUMBER}")
_PRINTED_UPDATE = re.compile(rf"iter (\d+): loss {_NUMBER}, time")

# How each of the curves is plotted, and its name in the legend.
_STYLES: dict[str, dict[str, Any]] = {
    "each iteration": {"alpha": 0.3, "linewidth": 0.8},
    "train loss": {"linestyle": "--"},
    "val loss": {"marker": "."},
}


class LossCurves(NamedTuple):
    """The losses of a run, in nats per token, by iteration; what is missing is NaN."""

    updates: dict[int, float]
    train: dict[int, float]
    val: dict[int, float]


def plot_losses(
    sources: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Plots the train and val loss of one run or several, and faintly the loss of each iteration.

    Args:
        sources: For each run its out_dir or its log.jsonl, a file of the lines that train.py has printed, or a
            trainer_state.json of Trainer's.
        output: File to write; its suffix chooses the format, such as .png, .svg or .pdf.
        overwrite: Whether output may be replaced.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
        CheckpointError: If a source cannot be read or has no losses, or output has a suffix that matplotlib does not
            know or cannot be written.
        ConversionError: If output exists and may not be replaced.
    """
    require("plot", "matplotlib")
    from matplotlib.figure import Figure

    path = Path(output)
    check_file(path, overwrite)
    figure = Figure(figsize=(7, 4), layout="constrained")
    formats = sorted(figure.canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in formats:
        raise fail(path, f"expected a suffix of {', '.join(formats)}, got {path.suffix!r}", "give one, as loss.png")
    axes = figure.subplots()
    for number, source in enumerate(sources):
        name = f"{os.fspath(source)}: " if len(sources) > 1 else ""
        for curve, (label, style) in zip(read_losses(source), _STYLES.items(), strict=True):
            if curve:
                axes.plot(list(curve), list(curve.values()), color=f"C{number % 10}", label=name + label, **style)
    axes.set(xlabel="iteration", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small").set_in_layout(False)  # the legend of many runs is higher than the axes
    with open_atomically(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower())


def read_losses(source: str | os.PathLike[str]) -> LossCurves:
    """Reads the losses of a run; of an iteration that was made twice, those of the second time.

    Raises:
        CheckpointError: If the source cannot be read, or has no losses.
    """
    path = _find_file(Path(source))
    with open_source(path) as file:
        text = file.read().decode("utf-8", errors="replace")
    history = _read_history(text)
    parsed = (parse_line(line) or _parse_printed(line) for line in text.splitlines())
    entries = [entry for entry in parsed if entry] if history is None else history
    curves = LossCurves(*(_collect(entries, name) for name in ("loss", "train/loss", "val/loss")))
    if not any(curves):
        raise fail(
            path,
            "no losses: expected lines of log.jsonl or of train.py's output, or Trainer's log_history, got none",
            "give the out_dir of `hugging-nano-gpt train`, or the file that train.py's output was saved to",
        )
    return curves


def _find_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    names = [LOG_NAME, STATE_NAME, *(f"{folder.name}/{STATE_NAME}" for folder in list_checkpoints(path))]
    for name in names:
        if (path / name).is_file():
            return path / name
    found = list_some(sorted(each.name for each in path.iterdir())) or "an empty folder"
    advice = "save train.py's output, as `python train.py ... | tee log.txt`, and give that file"
    raise fail(path, f"no losses: expected {LOG_NAME} or {STATE_NAME}, got {found}", advice)


def _parse_printed(line: str) -> dict[str, Any] | None:
    """Returns what a line of train.py's says, under the names of log.jsonl."""
    if match := _PRINTED_EVALUATION.search(line):
        return {"iter": int(match[1]), "train/loss": match[2], "val/loss": match[3]}
    if match := _PRINTED_UPDATE.search(line):
        return {"iter": int(match[1]), "loss": match[2]}
    return None


def _read_history(text: str) -> list[dict[str, Any]] | None:
    """Returns the log_history of a trainer_state.json under the names of log.jsonl; None for another file."""
    try:
        history = json.loads(text)["log_history"]
        offset = next((entry["iter"] - entry["step"] for entry in history if "iter" in entry), 0)
        has_both = any("val/loss" in entry for entry in history)  # then eval_loss may be of another data set
        renamed = {"loss": "loss", "train/loss": "train/loss", "val/loss" if has_both else "eval_loss": "val/loss"}
        return [
            {"iter": entry["step"] + offset, **{renamed[name]: entry[name] for name in renamed.keys() & entry.keys()}}
            for entry in history
        ]
    except (ValueError, TypeError, KeyError):
        return None


def _collect(entries: Iterable[dict[str, Any]], name: str) -> dict[int, float]:
    found: dict[int, float] = {}
    for entry in entries:
        if name in entry:
            found[entry["iter"]] = float(entry[name])
    return dict(sorted(found.items()))
