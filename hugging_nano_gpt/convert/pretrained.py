"""Loading complete models in safetensors from folders and from the Hub. None of their code is executed."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import CheckpointError, NanoGPTError, list_some
from ..files.files import advise_on_folder
from ..model.folder_nano_gpt import describe_interruption, refuse_change
from ..model.modeling_nano_gpt import NanoGPTLMHeadModel
from ..model.persistence_nano_gpt import describe_checkpoint
from ..tokenization.find import HUB_KWARGS

Model = TypeVar("Model", bound=PreTrainedModel)

# The models of the Hub without an owner that are GPT-2. Other such names are not looked for, which is slow offline.
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*|gpt2(-medium|-large|-xl)?|distilgpt2")


def is_hub_id(source: str | os.PathLike[str]) -> bool:
    """Returns whether a name may be a GPT on the Hub: owner/name, or one of those without an owner."""
    return _HUB_ID.fullmatch(os.fspath(source)) is not None


def select_hub(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Selects the arguments that say where on the Hub a model and its tokenizer are, and how to fetch them."""
    return {name: kwargs[name] for name in HUB_KWARGS if kwargs.get(name) is not None}


def read_model_type(source: str | os.PathLike[str], **hub: Any) -> str | None:
    """Reads the model_type of a folder or a model of the Hub; `hub` is of HUB_KWARGS.

    Raises:
        CheckpointError: If its config.json cannot be read, or the Hub cannot be reached.
    """
    return _read_fields(source, hub).get("model_type")


def read_config(model_class: type[PreTrainedModel], source: str | os.PathLike[str], **hub: Any) -> PreTrainedConfig:
    """Reads the configuration of a model of a class from a folder or the Hub; `hub` is of HUB_KWARGS.

    Raises:
        CheckpointError: If no config.json exists, it is of another kind of model, or the Hub cannot be reached.
    """
    fields = _read_fields(source, hub)
    _check_model_type(model_class, source, fields)
    with _explaining(source):
        return model_class.config_class.from_dict(fields)


def load_whole_model(
    model_class: type[Model],
    source: str | os.PathLike[str],
    *,
    check: Callable[[PreTrainedConfig], None] | None = None,
    **kwargs: Any,
) -> Model:
    """Loads a model of a class from a folder or the Hub, every tensor of it, from safetensors.

    Args:
        model_class: Class of the model.
        source: Folder or Hub id.
        check: Called with the configuration before any tensor is fetched, to raise if it does not suit.
        **kwargs: What from_pretrained takes; the dtype is that of the files by default.

    Raises:
        CheckpointError: If there is no whole model of this class there, or the Hub cannot be reached.
    """
    if kwargs.get("subfolder") and Path(source).is_dir():
        source = Path(
            source, kwargs.pop("subfolder")
        )  # Transformers would take generation_config.json from its parent
    with _explaining(source), refuse_change(Path(source)):
        config = read_config(model_class, source, **select_hub(kwargs))
        if check is not None:
            check(config)
        if getattr(config, "quantization_config", None):
            raise CheckpointError(
                f"{source}: quantised: expected the model's own numbers, got a quantization_config; give the model "
                f"that it was made from"
            )
        model, info = model_class.from_pretrained(
            source, **{"dtype": "auto", **kwargs}, use_safetensors=True, output_loading_info=True
        )
    faults = [f"{kind} {list_some(sorted(map(str, info[kind])))}" for kind in info if info[kind]]
    if faults:
        raise CheckpointError(
            f"{source}: not a whole model: expected every tensor once in its shape, got {'; '.join(faults)}; save it "
            f"again with save_pretrained"
        )
    return model


def _check_model_type(
    model_class: type[PreTrainedModel], source: str | os.PathLike[str], fields: dict[str, Any]
) -> None:
    """Refuses another kind of model, which from_pretrained would load as if it were of this class."""
    expected, model_type = model_class.config_class.model_type, fields.get("model_type")
    if not fields and Path(source).is_dir():
        raise CheckpointError(
            f"{source}: expected a checkpoint file or a folder with config.json, got a folder without; "
            f"{advise_on_folder(Path(source))}"
        )
    if model_type != expected:
        kind = "nanoGPT" if model_class is NanoGPTLMHeadModel else "GPT-2"
        raise CheckpointError(
            f"{source}: not a {kind} model: expected model_type {expected!r} in its config.json, got {model_type!r}; "
            f"give a model that {model_class.__name__}.save_pretrained wrote"
        )


def _read_fields(source: str | os.PathLike[str], hub: dict[str, Any]) -> dict[str, Any]:
    path = Path(source)
    is_file = path.is_file()
    fault = describe_checkpoint(path, NanoGPTLMHeadModel.__name__) if is_file else describe_interruption(path)
    if fault is not None:
        raise CheckpointError(fault)
    with _explaining(source):
        if not (path.is_dir() or is_hub_id(source)):
            raise FileNotFoundError("no such folder, and no hub id, which is owner/name")
        fields, _ = PreTrainedConfig.get_config_dict(source, **hub)
    return fields


@contextmanager
def _explaining(source: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what Transformers and the Hub raise into a CheckpointError."""
    try:
        yield
    except NanoGPTError:
        raise
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
        SafetensorError,
        StrictDataclassError,
    ) as error:
        first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(
            f"{source}: cannot be loaded: expected a folder that save_pretrained wrote, or a hub id that can be "
            f"fetched, got: {first_line.rstrip('.')}; check the path, the files in it, or the network"
        ) from error
