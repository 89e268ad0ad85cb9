"""Between checkpoints and models: a Checkpoint becomes a Transformers model, and a model becomes a Checkpoint.

Loading goes through Transformers' own from_pretrained, so all of its arguments work here too, and no weight is
initialized only to be overwritten. The methods of the model classes call these functions.
"""

import os
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..checkpoint.contents import NO_VAL_LOSS, Checkpoint, TrainingState
from ..checkpoint.formats import read_checkpoint, write_checkpoint
from ..checkpoint.layout import MODEL_ARGS
from ..checkpoint.moments import OptimizerState, from_adamw
from ..errors import ConversionError, list_some
from ..model.configuration_nano_gpt import NanoGPTConfig, is_exact_in_json
from ..tokenization.vocabulary import guess_generation_config
from .tensors import export_state_dict, get_model_args, refuse_changed_layers

logger = logging.get_logger(__name__)

Model = TypeVar("Model", bound=PreTrainedModel)

# What says how to read a checkpoint, and what may be set instead of the checkpoint's own: neither changes a shape.
READING_KWARGS = ("activation_function", "ignore_extra", "n_head", "tie_word_embeddings")
_CONFIG_KWARGS = (
    "bos_token_id",
    "dropout",
    "eos_token_id",
    "id2label",
    "label2id",
    "loss_chunk_size",
    "num_labels",
    "pad_token_id",
    "problem_type",
    "use_cache",
)


def load_model(model_class: type[Model], path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Makes a model of a class from a checkpoint file; see NanoGPTPreTrainedModel.from_nanogpt_ckpt."""
    reading = {name: kwargs.pop(name) for name in READING_KWARGS if name in kwargs}
    return make_model(model_class, path, read_checkpoint(path, with_optimizer=False, **reading), **kwargs)


def make_model(model_class: type[Model], path: str | os.PathLike[str], checkpoint: Checkpoint, **kwargs: Any) -> Any:
    """Makes a model of a class from a checkpoint that was read from a path; see from_nanogpt_ckpt."""
    fixed = [name for name in MODEL_ARGS if name in kwargs and name not in _CONFIG_KWARGS]
    if fixed:
        raise ConversionError(
            f"{os.fspath(path)}: {list_some(fixed)} cannot be set: expected the shapes of the checkpoint's tensors, "
            f"{[checkpoint.model_args[name] for name in fixed]}, got {[kwargs[name] for name in fixed]}; leave it out"
        )
    own = [name for name in ("config", "state_dict") if name in kwargs]
    if own:
        raise ConversionError(
            f"{os.fspath(path)}: {list_some(own)} cannot be set: expected the checkpoint's own, got another; leave it "
            f"out, and give what may differ by name: {', '.join(_CONFIG_KWARGS)}"
        )
    wants_info = kwargs.pop("output_loading_info", False)
    config = make_config(checkpoint, **{name: kwargs.pop(name) for name in _CONFIG_KWARGS if name in kwargs})
    model, info = model_class.from_pretrained(
        None,
        config=config,
        state_dict=_select_tensors(model_class, checkpoint),
        output_loading_info=True,
        **kwargs,
    )
    model.name_or_path = model.config.name_or_path = os.fspath(path)
    remember_training_state(model, checkpoint.training_state)
    if model.can_generate():
        guess_generation_config(model.generation_config, model.config.vocab_size, checkpoint.n_tokens)
    return (model, info) if wants_info else model


def make_config(checkpoint: Checkpoint, **fields: Any) -> NanoGPTConfig:
    """Makes the configuration of a checkpoint's model; `fields` replace those of the checkpoint."""
    names = ("activation_function", "tie_word_embeddings")
    return NanoGPTConfig(**{**checkpoint.model_args, **{name: getattr(checkpoint, name) for name in names}, **fields})


def save_model(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    *,
    optimizer: OptimizerState | Mapping[str, Any] | None = None,
    iter_num: int | None = None,
    best_val_loss: float | None = None,
    config: Mapping[str, Any] | None = None,
    overwrite: bool | None = None,
) -> None:
    """Writes a model to a checkpoint file; see NanoGPTLMHeadModel.to_nanogpt_ckpt."""
    refuse_changed_layers(model, path)
    state = read_training_state(model.config)
    model_args = get_model_args(model.config)
    state = TrainingState(
        iter_num=state.iter_num if iter_num is None else int(iter_num),
        best_val_loss=state.best_val_loss if best_val_loss is None else float(best_val_loss),
        config=state.config if config is None else dict(config),
        optimizer=_name_moments(path, optimizer, model_args),
    )
    if model.config.activation_function != "gelu":
        logger.warning(
            f"{os.fspath(path)}: the model computes {model.config.activation_function!r}, today's nanoGPT exact "
            f"GELU, so nanoGPT's numbers will differ slightly; its checkpoints cannot record the activation"
        )
    checkpoint = Checkpoint(model_args, export_state_dict(model), training_state=state)
    if _is_main_process():
        write_checkpoint(checkpoint, path, overwrite=overwrite)


def remember_training_state(model: PreTrainedModel, state: TrainingState) -> None:
    """Keeps a training state, without its optimizer, in the configuration of a model, and so in saved folders."""
    lost = [name for name, value in state.config.items() if not is_exact_in_json({name: value})]
    if lost:
        logger.warning(
            f"{model.name_or_path}: config: save_pretrained will leave out {list_some(lost)}: expected what JSON "
            f"can represent exactly, got other types; give config= to to_nanogpt_ckpt after from_pretrained"
        )
    model.config.nanogpt_training_state = {
        "iter_num": state.iter_num,
        "best_val_loss": state.best_val_loss,
        "config": dict(state.config),
    }


def read_training_state(config: PreTrainedConfig) -> TrainingState:
    """Returns the training state in a configuration, or that of a run before its first update."""
    kept = getattr(config, "nanogpt_training_state", None) or {}
    return TrainingState(
        iter_num=kept.get("iter_num", 0),
        best_val_loss=float(kept.get("best_val_loss", NO_VAL_LOSS)),
        config=dict(kept.get("config", {})),
    )


def _is_main_process() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _name_moments(
    path: str | os.PathLike[str], optimizer: OptimizerState | Mapping[str, Any] | None, model_args: Mapping[str, Any]
) -> OptimizerState | None:
    if optimizer is None or isinstance(optimizer, OptimizerState):
        return optimizer
    try:
        return from_adamw(optimizer, model_args, is_tied=True)
    except ValueError as error:
        raise ConversionError(f"{os.fspath(path)}: {error}; nothing was written") from error


def _select_tensors(model_class: type[PreTrainedModel], checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Leaves out lm_head where the model has none or ties it, as from_pretrained would report it as unexpected."""
    has_own_head = "lm_head.weight" in (model_class._tied_weights_keys or {}) and not checkpoint.tie_word_embeddings
    return {name: t for name, t in checkpoint.state_dict.items() if name != "lm_head.weight" or has_own_head}
