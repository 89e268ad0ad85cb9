"""What a checkpoint file or a saved folder contains, read without making a model of it."""

import math
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..checkpoint.contents import NO_VAL_LOSS, TrainingState
from ..checkpoint.formats import FILE_KINDS, read_checkpoint
from ..errors import CheckpointError, list_some
from ..model.configuration_nano_gpt import NanoGPTConfig
from ..model.modeling_nano_gpt import NanoGPTLMHeadModel
from .facts import count_model_parameters, describe_model, describe_training
from .nanogpt import make_config, read_training_state
from .pretrained import read_config
from .source import FOLDER, refuse_reading
from .tensors import get_model_args

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Inspection:
    """What a file or folder contains.

    Args:
        path: The file or folder.
        kind: What it is, in words.
        size_bytes: Size of the file, or of all files of the folder.
        model_config: Configuration of the model.
        training_state: State of the run, without its optimizer.
        dtypes: The tensors' dtypes.
        era: Which nanoGPT wrote the file, as far as it shows that; empty otherwise.
        has_optimizer: Whether there is an optimizer state.
        has_tokenizer: Whether there is a tokenizer; only folders have one.
        assumptions: What is not recorded and was assumed.
    """

    path: str
    kind: str
    size_bytes: int
    model_config: NanoGPTConfig
    training_state: TrainingState
    dtypes: tuple[str, ...]
    era: str = ""
    has_optimizer: bool = False
    has_tokenizer: bool = False
    assumptions: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns the facts as plain JSON types; other values, also infinity and NaN, are written as text."""
        config, state = self.model_config, self.training_state
        n_params, n_params_total = count_model_parameters(config)
        facts = {
            "path": self.path,
            "kind": self.kind,
            "size_bytes": self.size_bytes,
            "model_args": get_model_args(config),
            "activation_function": config.activation_function,
            "tie_word_embeddings": config.tie_word_embeddings,
            "dtypes": self.dtypes,
            "n_params": n_params,
            "n_params_total": n_params_total,
            "iter_num": state.iter_num,
            "best_val_loss": None if state.best_val_loss >= NO_VAL_LOSS else state.best_val_loss,
            "config": state.config,
            "era": self.era,
            "has_optimizer": self.has_optimizer,
            "has_tokenizer": self.has_tokenizer,
            "assumptions": self.assumptions,
        }
        return to_json(facts)

    def __str__(self) -> str:
        rows = {
            "what": f"{self.kind}{f', {self.era}' if self.era else ''}, {self.size_bytes / 1e6:,.1f} MB",
            **describe_model(self.model_config),
            "dtype": ", ".join(self.dtypes),
            **describe_training(self.training_state),
            "optimizer state": "yes" if self.has_optimizer else "no",
            "settings": ", ".join(f"{name}={value!r}" for name, value in self.training_state.config.items()) or "none",
        }
        if self.kind == FOLDER:
            rows["tokenizer"] = "yes" if self.has_tokenizer else "no"
        lines = [*rows.items(), *(("assumed", text) for text in self.assumptions)]
        return "\n".join([self.path, *(_wrap(name, text) for name, text in lines)])


def inspect_path(path: str | os.PathLike[str], **kwargs: Any) -> Inspection:
    """Describes what a checkpoint file or a saved folder contains.

    The tensors of a checkpoint are read and checked, except the optimizer's; of a folder only the headers are read.

    Args:
        path: A checkpoint of the nanoGPT family, or a folder that save_pretrained wrote.
        **kwargs: `n_head`, `activation_function` and `ignore_extra`, as in read_checkpoint.

    Raises:
        CheckpointError: If it is neither, a checkpoint is damaged, or a folder is asked to be read in another way than
            it records.
    """
    path = Path(path)
    if path.is_dir():
        refuse_reading(path, kwargs)
        return _inspect_folder(path)
    checkpoint = read_checkpoint(path, with_optimizer=False, **kwargs)
    return Inspection(
        os.fspath(path),
        FILE_KINDS[checkpoint.format],
        path.stat().st_size,
        make_config(checkpoint),
        checkpoint.training_state,
        tuple(sorted({str(t.dtype).removeprefix("torch.") for t in checkpoint.state_dict.values()})),
        era=checkpoint.era,
        has_optimizer=checkpoint.has_optimizer,
        assumptions=checkpoint.assumptions,
    )


def _inspect_folder(folder: Path) -> Inspection:
    config = read_config(NanoGPTLMHeadModel, folder)
    return Inspection(
        os.fspath(folder),
        FOLDER,
        sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
        config,
        read_training_state(config),
        _read_dtypes(folder),
        has_tokenizer=all((folder / name).is_file() for name in _TOKENIZER_FILES),
    )


def _read_dtypes(folder: Path) -> tuple[str, ...]:
    dtypes = set()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                dtypes |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}; save the model again") from error
    if not dtypes:
        files = sorted(file.name for file in folder.iterdir())
        raise CheckpointError(
            f"{folder}: expected tensors in *.safetensors, got {list_some(files)}; save the model again"
        )
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
    return tuple(sorted(names.get(dtype, dtype) for dtype in dtypes))


def to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key if isinstance(key, str) else repr(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    is_finite = not isinstance(value, float) or math.isfinite(value)
    return value if value is None or (isinstance(value, bool | int | float | str) and is_finite) else repr(value)


def _wrap(name: str, text: str) -> str:
    indent = " " * len(f"{'validation loss':<17}")
    return textwrap.fill(text, 100, initial_indent=f"{name:<17}", subsequent_indent=indent, break_long_words=False)
