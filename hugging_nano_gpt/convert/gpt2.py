"""Stock GPT-2's layout: nanoGPT models as folders that GPT2LMHeadModel loads without remote code, and back.

The tensors have the same names on both sides. GPT-2 stores four weights of each layer transposed (its Conv1D).
GPT-2 always has biases: a model without gets zeros. The function is then the same, but training would change them, so
the export of a model without biases is for inference (docs/gpt2.md).

Sources: nanoGPT's from_pretrained (model.py @ 3adf61e); Transformers' models/gpt2 and Conv1D.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers  # which imports GPT2LMHeadModel at its first use: few programs need it
from transformers import GPT2Config, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from ..errors import ConversionError, list_some
from ..files.files import check_folder, open_folder
from ..model.configuration_nano_gpt import ACTIVATION_FUNCTIONS, NanoGPTConfig
from ..model.modeling_nano_gpt import NanoGPTLMHeadModel
from ..tokenization.vocabulary import make_generation_config
from .pretrained import load_whole_model, select_hub
from .tensors import (
    check_tensors,
    export_state_dict,
    gather_checked_tensors,
    get_model_args,
    refuse_changed_layers,
    select_tensors,
)

logger = logging.get_logger(__name__)

# Conv1D's weights, (n_in, n_out) where nn.Linear has (n_out, n_in). They are listed by name because attn.c_proj is
# square, so that its shape does not show whether it is transposed.
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

_EPSILON = 1e-5  # of every LayerNorm of nanoGPT

_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")

# Fields with the same name and meaning in both configurations.
_SHARED_FIELDS = (
    "activation_function",
    "bos_token_id",
    "eos_token_id",
    "n_embd",
    "n_head",
    "n_layer",
    "pad_token_id",
    "tie_word_embeddings",
    "use_cache",
    "vocab_size",
)


def export_gpt2(
    model: NanoGPTLMHeadModel,
    folder: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: int | str = "50GB",
    overwrite: bool = False,
) -> tuple[str, ...]:
    """Writes a model as a folder that stock GPT2LMHeadModel loads.

    Weights are only moved, so import_gpt2 gives back the same bits. Logits differ only by the order of float32 sums
    (docs/gpt2.md). GPT-2's generate stops at block_size.

    Args:
        model: The model, of any floating dtype; tied or not.
        tokenizer: Tokenizer to save in the folder too.
        folder, max_shard_size, overwrite: As in convert_to_folder.

    Returns:
        What the folder drops, a sentence each.

    Raises:
        ConversionError: If the model has wrapped or quantised layers or NaN, or the folder cannot be written.
        TokenizerError: If the tokenizer has more tokens than the model has rows.
    """
    folder = Path(folder)
    check_folder(folder, overwrite)
    gpt2 = _make_gpt2(model, gather_checked_tensors(model, folder, tokenizer), tokenizer)
    with open_folder(folder, overwrite) as temporary:
        gpt2.save_pretrained(temporary, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    if model.config.bias:
        return ()
    return ("biases are zeros, as GPT-2 always has them: for inference only, because they would train",)


def import_gpt2(
    source: "str | os.PathLike[str] | transformers.GPT2LMHeadModel",
    *,
    bias: bool | None = None,
    dropout: float | None = None,
    **kwargs: Any,
) -> Any:
    """Makes a nanoGPT model from GPT-2, as nanoGPT's init_from=gpt2 does.

    Every tensor is copied bit for bit, and the GELU stays: OpenAI's models compute "gelu_new", today's nanoGPT the
    exact one.

    Args:
        source: Folder, Hub id or model; its weights are copied.
        bias: Whether the model has biases. False drops those of all Linear and LayerNorm modules, which must be zero.
            By default biases stay, except those that export_gpt2 added and that are still zero.
        dropout: The one dropout of nanoGPT, instead of GPT-2's three.
        **kwargs: What from_pretrained takes, such as `dtype`, `revision` and `subfolder`; by default the dtype is
            GPT-2's.

    Returns:
        A NanoGPTLMHeadModel in eval mode, with GPT-2's generation config; with output_loading_info=True, the model
        and from_pretrained's info.

    Raises:
        ConversionError: If GPT-2 has options without a counterpart in nanoGPT (each is listed), wrapped or quantised
            layers or NaN, or bias=False and a bias that is not zero.
        CheckpointError: If there is no whole GPT-2 model in safetensors, or the Hub cannot be reached.
    """
    hub = select_hub(kwargs)
    if isinstance(source, transformers.GPT2LMHeadModel):
        if hub:
            raise ConversionError(
                f"{type(source).__name__}: {list_some(hub)} cannot be set: expected none for a model in memory, got "
                f"{list(hub.values())}; leave it out, or give the hub id"
            )
        where = source.name_or_path or type(source).__name__
        _check_options(where, source.config, dropout)
        refuse_changed_layers(source, where)
        gpt2 = source
    elif isinstance(source, str | os.PathLike):
        where = os.fspath(source)
        gpt2 = load_whole_model(
            transformers.GPT2LMHeadModel, where, check=lambda config: _check_options(where, config, dropout), **hub
        )
    else:
        raise ConversionError(
            f"{type(source).__name__}: not GPT-2's language model: expected a folder, a hub id or a GPT2LMHeadModel, "
            f"got a {type(source).__name__}; give one of those"
        )
    config = _make_config(where, gpt2.config, dropout)
    tensors = _transpose({name: tensor.clone() for name, tensor in export_state_dict(gpt2).items()})
    check_tensors(where, config, tensors)
    config.bias = _settle_bias(where, tensors, bias, was_without=not getattr(gpt2.config, "nanogpt_bias", True))
    state_dict = select_tensors(tensors, get_model_args(config), is_tied=config.tie_word_embeddings)
    wants_info = kwargs.pop("output_loading_info", False)
    others = {name: value for name, value in kwargs.items() if name not in hub}
    model, info = NanoGPTLMHeadModel.from_pretrained(
        None, config=config, state_dict=state_dict, output_loading_info=True, **others
    )
    model.name_or_path = model.config.name_or_path = where
    model.generation_config = make_generation_config(gpt2, None)
    return (model, info) if wants_info else model


def _make_gpt2(
    model: NanoGPTLMHeadModel, tensors: Mapping[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase | None
) -> "transformers.GPT2LMHeadModel":
    config = model.config
    gpt2_config = make_gpt2_config(config)
    gpt2_config.nanogpt_bias = config.bias  # for import_gpt2, as is nanogpt_training_state
    gpt2_config.nanogpt_training_state = config.to_dict()["nanogpt_training_state"]
    selected = select_tensors(tensors, {**get_model_args(config), "bias": True}, config.tie_word_embeddings)
    state_dict = _transpose(selected)
    gpt2 = transformers.GPT2LMHeadModel.from_pretrained(None, config=gpt2_config, state_dict=state_dict)
    gpt2.generation_config = make_generation_config(model, tokenizer)
    return gpt2


def make_gpt2_config(config: NanoGPTConfig) -> GPT2Config:
    """Makes the configuration of the GPT-2 that computes the same."""
    return GPT2Config(
        **{name: getattr(config, name) for name in _SHARED_FIELDS},
        **dict.fromkeys(_DROPOUTS, config.dropout),
        n_positions=config.block_size,
        n_ctx=config.block_size,  # llama.cpp's converter reads it, and Transformers 5 does not write it on its own
        layer_norm_epsilon=_EPSILON,
    )


def _make_config(where: str, gpt2: PreTrainedConfig, dropout: float | None) -> NanoGPTConfig:
    try:
        return NanoGPTConfig(
            **{name: getattr(gpt2, name) for name in _SHARED_FIELDS},
            block_size=gpt2.n_positions,
            bias=True,
            dropout=gpt2.resid_pdrop if dropout is None else dropout,
            nanogpt_training_state=getattr(gpt2, "nanogpt_training_state", None),
        )
    except ValueError as error:
        raise ConversionError(
            f"{where}: cannot be a nanoGPT model: {error}; give dropout= a possible value"
        ) from error


def _transpose(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Transposes the weights that differ: from nn.Linear's layout to Conv1D's, or back."""
    return {name: t.t().contiguous() if name.endswith(_TRANSPOSED) else t for name, t in tensors.items()}


def _check_options(where: str, config: PreTrainedConfig, dropout: float | None) -> None:
    """Raises ConversionError with every option of GPT-2 that has no counterpart in nanoGPT."""
    expected: dict[str, tuple[Any, ...]] = {
        "activation_function": ACTIVATION_FUNCTIONS,
        "add_cross_attention": (False,),
        "layer_norm_epsilon": (_EPSILON,),
        "n_inner": (None, 4 * config.n_embd),
        "quantization_config": (None,),
        "reorder_and_upcast_attn": (False,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "scale_attn_weights": (True,),
    }
    found = {name: getattr(config, name, None) for name in expected}
    faults = [
        f"{name}: expected {' or '.join(map(repr, values))}, got {found[name]!r}"
        for name, values in expected.items()
        if found[name] not in values
    ]
    dropouts = {name: getattr(config, name) for name in _DROPOUTS}
    if dropout is None and len(set(dropouts.values())) > 1:
        got = ", ".join(f"{name}={value!r}" for name, value in dropouts.items())
        faults.append(f"dropouts: expected one for all three, or dropout= instead of them, got {got}")
    if faults:
        raise ConversionError(
            f"{where}: has no counterpart in nanoGPT: {'; '.join(faults)}; use it as GPT2LMHeadModel"
        )


def _settle_bias(where: str, tensors: Mapping[str, torch.Tensor], bias: bool | None, was_without: bool) -> bool:
    """Returns whether the model gets biases; refuses to drop biases that are not zero."""
    trained = [name for name, tensor in tensors.items() if name.endswith(".bias") and tensor.any()]
    if bias is False and trained:
        raise ConversionError(
            f"{where}: biases cannot be dropped: expected zeros, got other numbers in {list_some(trained)}; leave "
            f"bias=False out"
        )
    if bias is None and was_without and trained:
        logger.warning(
            f"{where}: expected zero biases, as it was exported from a model without, got other numbers in "
            f"{list_some(trained)}: they were trained since and are kept"
        )
    return bool(trained) or (not was_without if bias is None else bias)
