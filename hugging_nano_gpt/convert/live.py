"""A nanoGPT model in memory as a Transformers model that shares its tensors: nothing is copied or read."""

from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.layout import MODEL_ARGS, strip_wrappers
from ..errors import ConversionError, list_some
from ..model.configuration_nano_gpt import NanoGPTConfig
from ..tokenization.vocabulary import guess_generation_config

Model = TypeVar("Model", bound=PreTrainedModel)

# Where DDP, torch.compile and Lightning Fabric keep the module that they wrap.
_WRAPPERS = ("module", "_orig_mod", "_forward_module")


def share_model(model_class: type[Model], gpt: nn.Module, **fields: Any) -> Model:
    """Makes a model of a class that has the parameters of a nanoGPT GPT; see NanoGPTPreTrainedModel.from_nanogpt."""
    while (wrapper := next((name for name in _WRAPPERS if hasattr(gpt, name)), None)) is not None:
        gpt = getattr(gpt, wrapper)
    where = type(gpt).__name__
    found: Any = getattr(gpt, "config", None)
    absent = [name for name in MODEL_ARGS if not hasattr(found, name)]
    if absent:
        raise ConversionError(
            f"{where}: not a nanoGPT model: expected a config with {', '.join(MODEL_ARGS)}, got none of "
            f"{list_some(absent)}; give train.py's model"
        )
    parameters = {strip_wrappers(name): parameter for name, parameter in gpt.named_parameters(remove_duplicate=False)}
    is_tied = parameters.get("lm_head.weight") is parameters.get("transformer.wte.weight")
    shape = {name: getattr(found, name) for name in MODEL_ARGS}
    config = NanoGPTConfig(**{**shape, "tie_word_embeddings": is_tied, **fields})
    with torch.device("meta"):  # no random numbers are drawn
        model = model_class(config)
    expected = model.state_dict().keys()
    differing = sorted(expected ^ parameters.keys())
    if differing:
        raise ConversionError(
            f"{where}: other parameters than nanoGPT's: expected the same names, got {list_some(differing)} on one "
            f"side only; its code has been changed"
        )
    for name, parameter in parameters.items():  # load_state_dict would set requires_grad of the shared ones
        owner, _, own_name = name.rpartition(".")
        _check_shape(where, name, model.get_parameter(name), parameter)
        setattr(model.get_submodule(owner), own_name, parameter)
    guess_generation_config(model.generation_config, config.vocab_size, None)
    return model.eval()


def _check_shape(where: str, name: str, expected: torch.Tensor, found: torch.Tensor) -> None:
    if expected.shape != found.shape:
        raise ConversionError(
            f"{where}: {name}: expected shape {tuple(expected.shape)}, as its config says, got {tuple(found.shape)}; "
            f"its code has been changed"
        )
