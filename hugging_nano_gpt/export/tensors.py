"""A model's tensors as exporters take them: checked to be nanoGPT's, whole and finite, with biases filled in."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ..configuration_nano_gpt import NanoGPTConfig
from ..conversion import export_state_dict, refuse_changed_layers
from ..errors import ConversionError
from ..formats.check import find_dense_faults, find_model_faults, find_number_faults, is_tied
from ..formats.shapes import MODEL_ARGS, iterate_shapes


def list_args(config: NanoGPTConfig) -> dict[str, Any]:
    """Returns nanoGPT's model_args of a configuration."""
    return {name: getattr(config, name) for name in MODEL_ARGS}


def take_tensors(where: str, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Returns the tensors of a nanoGPT model on the CPU; raises ConversionError where it is not whole and plain."""
    refuse_changed_layers(model, where)
    tensors = export_state_dict(model)
    check_tensors(where, model.config, tensors)
    return tensors


def check_tensors(where: str, config: NanoGPTConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises ConversionError where tensors, in nanoGPT's layout, are not a nanoGPT model of finite numbers."""
    faults = find_dense_faults(tensors)
    faults = faults or find_model_faults(list_args(config), tensors)
    faults = faults or find_number_faults(tensors)
    if not faults and config.tie_word_embeddings and not is_tied(tensors):
        faults = ["lm_head.weight: expected the numbers of transformer.wte.weight, as it is tied, got others"]
    if faults:
        raise ConversionError(f"{where}: cannot be converted: {'; '.join(faults)}; give a whole, plain model")


def select_tensors(
    tensors: Mapping[str, torch.Tensor], model_args: Mapping[str, Any], is_tied: bool
) -> dict[str, torch.Tensor]:
    """Returns the tensors that a model of these model_args saves: with zeros for biases that are not there."""
    dtype = tensors["transformer.wte.weight"].dtype
    return {
        name: tensors[name] if name in tensors else torch.zeros(shape, dtype=dtype)
        for name, shape in iterate_shapes(model_args)
        if name != "lm_head.weight" or not is_tied
    }
