"""What torch.distributed.checkpoint makes of a checkpoint, taken back: dcp.save, and then dcp_to_torch_save.

It keeps tensors and values, but keys become text: the moments of parameter 0 are under "0". What get_state_dict of
torch.distributed.checkpoint.state_dict returns names the parameters as the model does, and is usually saved as
{"model", "optim"}. An optimizer state that get_state_dict has flattened too is not read.
"""

import re
from collections.abc import Mapping
from typing import Any

from .optimizer import GROUPINGS, list_parameter_shapes
from .tensors import strip_wrappers

_HEAD, _EMBEDDING = "lm_head.weight", "transformer.wte.weight"


def rename_optimizer(contents: dict[Any, Any]) -> dict[Any, Any]:
    """Returns a checkpoint's dict with its optimizer under nanoGPT's name."""
    if "optim" not in contents or "optimizer" in contents:
        return contents
    return {"optimizer" if key == "optim" else key: value for key, value in contents.items()}


def number_parameters(adamw: Any, model_args: Mapping[str, Any], is_tied: bool) -> Any:
    """Returns a torch.optim.AdamW state dict with its parameters under their numbers, as torch.optim saves them.

    Args:
        adamw: The state dict, with parameters under numbers, under numbers as text, or under the model's names.
        model_args: nanoGPT's.
        is_tied: Whether lm_head is the token embedding.

    Returns:
        The same with numbers; `adamw` itself if it has another form.
    """
    if not isinstance(adamw, dict) or not isinstance(adamw.get("param_groups"), list):
        return adamw
    state, groups = adamw.get("state", {}), adamw["param_groups"]  # an empty state is not saved at all
    if not isinstance(state, dict) or not all(isinstance(group, dict) for group in groups):
        return adamw
    names = [group.get("params") for group in groups]
    if not all(isinstance(group, list) and all(isinstance(name, str) for name in group) for group in names):
        numbered = {_read_number(key): moments for key, moments in state.items()}
        return {**adamw, "state": numbered if len(numbered) == len(state) else state}
    names = [[_clean(name, is_tied) for name in group] for group in names]
    shapes = list_parameter_shapes(model_args, is_tied)
    for grouping in GROUPINGS:
        known = grouping(list(shapes), shapes)
        if [sorted(group) for group in names] == [sorted(group) for group in known]:
            numbers = {name: number for number, name in enumerate(known[0] + known[1])}
            params = [[numbers[name] for name in group] for group in known]
            numbered = {numbers.get(_clean(key, is_tied), key): moments for key, moments in state.items()}
            return {
                "state": numbered if len(numbered) == len(state) else state,
                "param_groups": [{**group, "params": p} for group, p in zip(groups, params, strict=True)],
            }
    return adamw


def _read_number(key: Any) -> Any:
    return int(key) if isinstance(key, str) and re.fullmatch(r"0|[1-9][0-9]{0,8}", key) else key


def _clean(name: Any, is_tied: bool) -> Any:
    name = strip_wrappers(name) if isinstance(name, str) else name
    return _EMBEDDING if is_tied and name == _HEAD else name
