"""A model's tensors for writers: on the CPU, checked to be nanoGPT's, complete and finite, with biases filled in."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ..checkpoint.faults import find_dense_faults, find_model_faults, find_number_faults, find_tying_faults
from ..checkpoint.layout import MODEL_ARGS, iterate_shapes
from ..errors import ConversionError, join_some, list_some
from ..model.configuration_nano_gpt import NanoGPTConfig
from ..tokenization.vocabulary import check_tokenizer

# The modules that have parameters, by the last part of their name, and what they compute; Conv1D is GPT-2's.
_LAYERS = frozenset(("wte", "wpe", "ln_1", "ln_2", "ln_f", "c_attn", "c_proj", "c_fc", "lm_head"))
_FORWARDS = (nn.Linear.forward, nn.Embedding.forward, nn.LayerNorm.forward, Conv1D.forward)


def get_model_args(config: NanoGPTConfig) -> dict[str, Any]:
    """Returns nanoGPT's model_args of a configuration."""
    return {name: getattr(config, name) for name in MODEL_ARGS}


def gather_checked_tensors(
    model: PreTrainedModel, out: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, torch.Tensor]:
    """Returns the tensors of a nanoGPT model on the CPU, to be written to `out` together with a tokenizer.

    Raises:
        ConversionError: If the model is not complete, or has layers that nanoGPT does not have.
        TokenizerError: If the tokenizer has more tokens than the model has rows.
    """
    if tokenizer is not None:
        check_tokenizer(tokenizer.name_or_path or "tokenizer", tokenizer, model.config.vocab_size)
    refuse_changed_layers(model, out)
    tensors = export_state_dict(model)
    check_tensors(os.fspath(out), model.config, tensors)
    return tensors


def check_tensors(where: str, config: NanoGPTConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises ConversionError if tensors in nanoGPT's layout are not a nanoGPT model of finite numbers."""
    faults = find_dense_faults(tensors)
    faults = faults or find_model_faults(get_model_args(config), tensors)
    faults = faults or find_number_faults(tensors)
    if not faults and config.tie_word_embeddings:
        faults = find_tying_faults(tensors)
    if faults:
        raise ConversionError(f"{where}: cannot be converted: {'; '.join(faults)}; give a whole, plain model")


def select_tensors(
    tensors: Mapping[str, torch.Tensor], model_args: Mapping[str, Any], is_tied: bool
) -> dict[str, torch.Tensor]:
    """Returns the tensors that a model of these model_args saves, with zeros for missing biases."""
    dtype = tensors["transformer.wte.weight"].dtype
    return {
        name: tensors[name] if name in tensors else torch.zeros(shape, dtype=dtype)
        for name, shape in iterate_shapes(model_args)
        if name != "lm_head.weight" or not is_tied
    }


def refuse_changed_layers(model: PreTrainedModel, path: str | os.PathLike[str]) -> None:
    """Raises ConversionError if PEFT, torchao, bitsandbytes or others have replaced layers, and says what to do."""
    # PEFT wraps what it adapts: base_layer is in its own layers, original_module in copies of layers that it trains.
    inner = ("base_layer", "original_module")
    adapted = [parent for parent, _, name in (n.rpartition(".") for n, _ in model.named_modules()) if name in inner]
    if adapted:
        raise ConversionError(
            f"{os.fspath(path)}: expected nanoGPT's own layers, got PEFT's at {list_some(adapted)}; merge the adapter "
            f"first, and write what peft_model.merge_and_unload() returns; nothing was written"
        )
    # torchao uses a tensor class of its own; bitsandbytes a subclass of Parameter, and sets is_quantized.
    plain = (torch.Tensor, torch.nn.Parameter)
    odd = [n for n, p in model.named_parameters() if type(p) not in plain and not hasattr(p, "full_tensor")]
    if odd or getattr(model, "is_quantized", False):
        at = f" at {list_some(odd)}" if odd else ""
        raise ConversionError(
            f"{os.fspath(path)}: expected floating-point layers, got quantised ones{at}; "
            f"their rounding cannot be undone: write the model that was quantised; nothing was written"
        )
    # A subclass with the same forward, such as FSDP's, computes the same.
    changed = [
        f"{type(module).__module__}.{type(module).__qualname__} at {name!r}"
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in _LAYERS and getattr(type(module), "forward", None) not in _FORWARDS
    ]
    if changed:
        raise ConversionError(
            f"{os.fspath(path)}: expected the layers that the model was built with, got {join_some(changed)}; "
            f"give the model as it was before they were replaced; nothing was written"
        )


def export_state_dict(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Returns the model's tensors on the CPU, sharded ones whole; tied tensors stay one tensor unless offloaded."""
    if any(parameter.is_meta for parameter in model.parameters()):  # offloaded by accelerate, to the CPU or the disk
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        return get_state_dict_offloaded_model(model)
    moved: dict[int, torch.Tensor] = {}
    state_dict = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in moved:
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # FSDP2: on every process
            moved[id(tensor)] = whole.detach().to("cpu").contiguous()
        state_dict[name] = moved[id(tensor)]
    return state_dict
