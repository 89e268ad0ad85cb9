"""What a checkpoint file or a saved folder holds, without making a model of it."""

import math
import os
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from ..checkpoint.contents import NO_VAL_LOSS, TrainingState
from ..checkpoint.read_write import read_checkpoint
from ..errors import CheckpointError, list_some
from ..model.configuration_nano_gpt import NanoGPTConfig
from ..model.modeling_nano_gpt import NanoGPTLMHeadModel
from .facts import count_model_parameters, describe_model, describe_training
from .nanogpt import make_config, read_training_state
from .pretrained import read_config
from .source import FILE_KINDS, FOLDER, refuse_reading
from .tensors import get_model_args

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Inspection:
    """What a file or folder holds.

    Args:
        path: The file or folder.
        kind: What it is, in words.
        size_bytes: Size of the file, or of all files of the folder.
        model_args: nanoGPT's seven model_args.
        activation_function: The activation, in NanoGPTConfig's terms.
        tie_word_embeddings: Whether lm_head is the token embedding.
        dtypes: The tensors' dtypes.
        n_params: Parameters as nanoGPT counts them: without the position embedding.
        n_params_total: All parameters.
        iter_num: Optimizer updates made.
        best_val_loss: Lowest validation loss seen, in nats per token, or None before the first evaluation.
        config: train.py's settings.
        era: Which nanoGPT wrote it, as far as the file tells; empty if there is nothing to tell.
        has_optimizer: Whether there is an optimizer state.
        has_tokenizer: Whether there is a tokenizer; only folders have one.
        assumptions: What is not recorded and was assumed.
    """

    path: str
    kind: str
    size_bytes: int
    model_args: dict[str, Any]
    activation_function: str
    tie_word_embeddings: bool
    dtypes: tuple[str, ...]
    n_params: int
    n_params_total: int
    iter_num: int
    best_val_loss: float | None
    config: dict[str, Any]
    era: str = ""
    has_optimizer: bool = False
    has_tokenizer: bool = False
    assumptions: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as plain JSON types: other values, infinity and NaN too, are written out as text."""
        return _to_json(asdict(self))

    def __str__(self) -> str:
        config = NanoGPTConfig(
            **self.model_args,
            activation_function=self.activation_function,
            tie_word_embeddings=self.tie_word_embeddings,
        )
        loss = NO_VAL_LOSS if self.best_val_loss is None else self.best_val_loss
        rows = {
            "what": f"{self.kind}{f', {self.era}' if self.era else ''}, {self.size_bytes / 1e6:,.1f} MB",
            **describe_model(config),
            "dtype": ", ".join(self.dtypes),
            **describe_training(TrainingState(self.iter_num, loss)),
            "optimizer state": "yes" if self.has_optimizer else "no",
            "settings": ", ".join(f"{name}={value!r}" for name, value in self.config.items()) or "none",
            "tokenizer": "yes" if self.has_tokenizer else "no",
        }
        if self.kind != FOLDER:
            del rows["tokenizer"]
        lines = [*rows.items(), *(("assumed", text) for text in self.assumptions)]
        return "\n".join([self.path, *(_wrap(name, text) for name, text in lines)])


def inspect_path(path: str | os.PathLike[str], **kwargs: Any) -> Inspection:
    """Says what a checkpoint file or a saved folder contains.

    A checkpoint's tensors are read and checked, but for the optimizer's; of a folder only the headers are read.

    Args:
        path: A checkpoint of the nanoGPT family, or a folder that save_pretrained wrote.
        **kwargs: `n_head` and `activation_function`, for what a file does not record, and `ignore_extra`, as in
            read_checkpoint.

    Raises:
        CheckpointError: If it is neither, a checkpoint is damaged, or a folder is asked to be read in another way than
            it records.
    """
    if not Path(path).is_dir():
        return _inspect_file(Path(path), **kwargs)
    refuse_reading(path, kwargs)
    return _inspect_folder(Path(path))


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key if isinstance(key, str) else repr(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    is_json = (
        value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
    )
    return value if is_json else repr(value)


def _wrap(name: str, text: str) -> str:
    indent = " " * len(f"{'validation loss':<17}")
    return textwrap.fill(text, 100, initial_indent=f"{name:<17}", subsequent_indent=indent, break_long_words=False)


def _inspect_file(path: Path, **kwargs: Any) -> Inspection:
    checkpoint = read_checkpoint(path, with_optimizer=False, **kwargs)
    return _make_inspection(
        make_config(checkpoint),
        checkpoint.training_state,
        path=os.fspath(path),
        kind=FILE_KINDS[checkpoint.format],
        era=checkpoint.era,
        size_bytes=path.stat().st_size,
        dtypes=tuple(sorted({str(t.dtype).removeprefix("torch.") for t in checkpoint.state_dict.values()})),
        has_optimizer=checkpoint.has_optimizer,
        assumptions=checkpoint.assumptions,
    )


def _inspect_folder(folder: Path) -> Inspection:
    config = read_config(NanoGPTLMHeadModel, folder)
    return _make_inspection(
        config,
        read_training_state(config),
        path=os.fspath(folder),
        kind=FOLDER,
        size_bytes=sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
        dtypes=_read_dtypes(folder),
        has_tokenizer=all((folder / name).is_file() for name in _TOKENIZER_FILES),
    )


def _make_inspection(config: PreTrainedConfig, state: TrainingState, **fields: Any) -> Inspection:
    n_params, n_params_total = count_model_parameters(config)
    return Inspection(
        model_args=get_model_args(config),
        activation_function=config.activation_function,
        tie_word_embeddings=config.tie_word_embeddings,
        n_params=n_params,
        n_params_total=n_params_total,
        iter_num=state.iter_num,
        best_val_loss=None if state.best_val_loss >= NO_VAL_LOSS else state.best_val_loss,
        config=state.config,
        **fields,
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
