"""Between checkpoints and models: a Checkpoint becomes a Transformers model, and a model becomes a Checkpoint.

Loading goes through Transformers' own from_pretrained, so every argument that users know from there works here, and
nothing is initialised that the checkpoint then overwrites. The classmethods of the model classes call these functions.
"""

import os
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .checkpoint import read_checkpoint, write_checkpoint
from .configuration_nano_gpt import NanoGPTConfig
from .errors import ConversionError
from .formats.check import list_optimizer_shapes, list_some
from .formats.contents import MODEL_ARGS, Checkpoint, TrainingState

logger = logging.get_logger(__name__)

Model = TypeVar("Model", bound=PreTrainedModel)

# What a user may set in place of the checkpoint's: nothing here changes the shape of a tensor.
_CONFIG_KWARGS = (
    "activation_function",
    "bos_token_id",
    "dropout",
    "eos_token_id",
    "id2label",
    "label2id",
    "num_labels",
    "pad_token_id",
    "problem_type",
    "use_cache",
)

# GPT-2's vocabulary, whole and as nanoGPT pads it, and its <|endoftext|>, which stands between the documents of
# nanoGPT's data (data/openwebtext/prepare.py @ 3adf61e).
_GPT2_VOCAB_SIZES = (50257, 50304)
_GPT2_END_OF_TEXT = 50256

# AdamW as nanoGPT sets it up when nothing else is said (train.py @ 3adf61e): the config's names and their defaults.
_OPTIMIZER_DEFAULTS = {"learning_rate": 6e-4, "weight_decay": 1e-1, "beta1": 0.9, "beta2": 0.95}


def load_model(model_class: type[Model], path: str | os.PathLike[str], **kwargs: Any) -> Model:
    """Makes a model of a class from a checkpoint file; see NanoGPTPreTrainedModel.from_nanogpt_ckpt."""
    checkpoint = read_checkpoint(path, with_optimizer=False)
    fixed = [name for name in MODEL_ARGS if name in kwargs and name not in _CONFIG_KWARGS]
    if fixed:
        raise ConversionError(
            f"{os.fspath(path)}: {list_some(fixed)} cannot be set: expected the shapes of the checkpoint's tensors, "
            f"{[checkpoint.model_args[name] for name in fixed]}, got {[kwargs[name] for name in fixed]}; leave it out"
        )
    overrides = {name: kwargs.pop(name) for name in _CONFIG_KWARGS if name in kwargs}
    settings = {"activation_function": checkpoint.activation_function, **checkpoint.model_args, **overrides}
    config = NanoGPTConfig(tie_word_embeddings=checkpoint.is_tied, **settings)
    model: Model = model_class.from_pretrained(
        None, config=config, state_dict=_select_tensors(model_class, checkpoint), **kwargs
    )
    model.name_or_path = model.config.name_or_path = os.fspath(path)
    model.nanogpt_training_state = checkpoint.training_state
    if model.can_generate():
        _set_start_and_end(model, checkpoint.model_args["vocab_size"])
    return model


def save_model(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    *,
    optimizer: Mapping[str, Any] | None = None,
    iter_num: int | None = None,
    best_val_loss: float | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model to a checkpoint file; see NanoGPTLMHeadModel.to_nanogpt_ckpt."""
    state: TrainingState = getattr(model, "nanogpt_training_state", TrainingState())
    model_args = {name: getattr(model.config, name) for name in MODEL_ARGS}
    settings = state.config if config is None else dict(config)
    state = TrainingState(
        iter_num=state.iter_num if iter_num is None else int(iter_num),
        best_val_loss=state.best_val_loss if best_val_loss is None else float(best_val_loss),
        config=settings,
        optimizer=make_fresh_optimizer_state(model_args, settings) if optimizer is None else dict(optimizer),
    )
    if model.config.activation_function != "gelu":
        logger.warning(
            f"{os.fspath(path)}: the model computes {model.config.activation_function!r}, today's nanoGPT exact "
            f"GELU, so nanoGPT's numbers will differ slightly; its checkpoints have no place to record the activation"
        )
    write_checkpoint(Checkpoint(model_args, _export_state_dict(model), state), path)


def make_fresh_optimizer_state(model_args: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the AdamW state dict of nanoGPT's optimizer before its first step.

    Args:
        model_args: nanoGPT's seven model_args.
        config: train.py's settings; those of the optimizer are used, nanoGPT's defaults stand in for missing ones.

    Returns:
        State dict with no moments and nanoGPT's two groups: two or more dimensions decayed, the others not.
    """
    setting = {name: config.get(name, default) for name, default in _OPTIMIZER_DEFAULTS.items()}
    parameters = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in list_optimizer_shapes(model_args)]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": setting["weight_decay"]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (setting["beta1"], setting["beta2"])
    return torch.optim.AdamW(groups, lr=setting["learning_rate"], betas=betas).state_dict()


def _select_tensors(model_class: type[PreTrainedModel], checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Leaves out lm_head where the model has none or ties it, as from_pretrained would report it as unexpected."""
    has_own_head = "lm_head.weight" in (model_class._tied_weights_keys or {}) and not checkpoint.is_tied
    return {name: t for name, t in checkpoint.state_dict.items() if name != "lm_head.weight" or has_own_head}


def _set_start_and_end(model: PreTrainedModel, vocab_size: int) -> None:
    """Lets generate() start without a prompt and, where the vocabulary has an end of text, stop at it."""
    settings = model.generation_config
    if vocab_size in _GPT2_VOCAB_SIZES:
        defaults = {"bos_token_id": _GPT2_END_OF_TEXT, "eos_token_id": _GPT2_END_OF_TEXT}
    else:  # token 0 is the newline of nanoGPT's character data, with which sample.py starts by default
        defaults = {"bos_token_id": 0}
    for name, value in defaults.items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)


def _export_state_dict(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Copies references to the model's tensors to the CPU; tied tensors stay one tensor."""
    moved: dict[int, torch.Tensor] = {}
    state_dict = {}
    for name, tensor in model.state_dict().items():
        key = tensor.data_ptr()
        if key not in moved:
            moved[key] = tensor.detach().to("cpu").contiguous()
        state_dict[name] = moved[key]
    return state_dict
