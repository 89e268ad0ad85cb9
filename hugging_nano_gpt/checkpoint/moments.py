"""AdamW's moments by parameter name, and the ways in which files have numbered the parameters.

torch.optim saves moments under numbers, and which tensor is number 7 depends on how the code of the day grouped them.
Read by name and written in today's order, the moments of every era resume in today's train.py. A state that fits none
of the groupings, or that does not fit by shape, is refused and never guessed. torch.distributed.checkpoint turns the
numbers into text, or saves the parameters' names.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from ..errors import join_some
from .layout import list_parameter_shapes, strip_wrappers

Names = list[str]
Grouping = Callable[[Names, Mapping[str, tuple[int, ...]]], tuple[Names, Names]]

# What AdamW keeps for each parameter in addition to the step count, all of the parameter's shape; and with amsgrad.
_MOMENTS = ("exp_avg", "exp_avg_sq")
_AMSGRAD_MOMENTS = (*_MOMENTS, "max_exp_avg_sq")

# The settings of every AdamW since torch 1.2; RAdam, NAdam and SGD lack some.
_SETTINGS = {"lr", "betas", "eps", "weight_decay", "amsgrad"}

# nanoGPT's defaults for AdamW, by their names in the config (train.py @ 3adf61e).
_CONFIG_DEFAULTS = {"learning_rate": 6e-4, "weight_decay": 1e-1, "beta1": 0.9, "beta2": 0.95}


def group_by_dimension(names: Names, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Names, Names]:
    """Decays what has two or more dimensions, in the order of named_parameters (since 7fe4a099, 2023-05-06)."""
    return [name for name in names if len(shapes[name]) >= 2], [name for name in names if len(shapes[name]) < 2]


def group_by_module(names: Names, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Names, Names]:
    """Decays the weights of Linear modules but no embedding, names sorted (before 7fe4a099, 2023-05-06)."""
    embeddings = ("transformer.wte.weight", "transformer.wpe.weight")
    decayed = [name for name in names if len(shapes[name]) >= 2 and name not in embeddings]
    return sorted(decayed), sorted(set(names) - set(decayed))


GROUPINGS: tuple[Grouping, ...] = (group_by_dimension, group_by_module)


@dataclass(frozen=True)
class OptimizerState:
    """The state of nanoGPT's AdamW.

    Args:
        settings: lr, betas, eps, weight_decay and the rest, of the two parameter groups: the decayed and the others.
        moments: step (a float32 scalar), exp_avg and exp_avg_sq (of the parameter's shape) by parameter name. Empty
            before the first update.
        grouping: How the file grouped the parameters.
    """

    settings: tuple[dict[str, Any], dict[str, Any]]
    moments: dict[str, dict[str, Any]]
    grouping: Grouping = group_by_dimension

    def find_faults(self, model_args: Mapping[str, Any]) -> list[str]:
        """Finds moments that do not fit nanoGPT's model of these model_args; returns a sentence for each."""
        if len(self.settings) != 2 or not all(isinstance(value, dict) for value in (*self.settings, self.moments)):
            return ["optimizer: expected settings of two groups and a dict of moments, got others"]
        shapes = list_parameter_shapes(model_args, is_tied=True)
        wrong = []
        for name, moments in self.moments.items():
            expected = list_moments(self.settings[len(shapes.get(name, ())) < 2])
            found = _list_shapes(moments, expected)
            if found != [shapes.get(name)] * len(expected):
                shape = shapes.get(name, "no parameter")
                wrong.append(f"{name!r}: expected {', '.join(expected)} of {shape}, got {found}")
            elif "step" not in moments:
                wrong.append(f"{name!r}: expected a step, got none")
        return [f"optimizer: {join_some(wrong)}"] if wrong else []

    def to_adamw(self, model_args: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the torch.optim.AdamW state dict for today's nanoGPT, in its groups and its order."""
        shapes = list_parameter_shapes(model_args, is_tied=True)
        numbers, param_groups = _number_groups(group_by_dimension(list(shapes), shapes), self.settings)
        state = {numbers[name]: moments for name, moments in self.moments.items()}
        return {"state": dict(sorted(state.items())), "param_groups": param_groups}


def list_moments(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Lists the moments that AdamW with some settings keeps for each parameter."""
    return _AMSGRAD_MOMENTS if settings.get("amsgrad") else _MOMENTS


def is_adamw(settings: Mapping[str, Any]) -> bool:
    """Returns whether the settings of a group are AdamW's, or Adam's where the two compute the same."""
    if not settings.keys() >= _SETTINGS:
        return False
    return settings.get("decoupled_weight_decay", True) or settings["weight_decay"] == 0


def _number_groups(
    groups: tuple[Names, Names], settings: Sequence[Any]
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Returns the numbers of the parameters by name, and the param_groups of a torch.optim state dict."""
    numbers = {name: number for number, name in enumerate(chain(*groups))}
    params = [[numbers[name] for name in group] for group in groups]
    return numbers, [{**own, "params": each} for own, each in zip(settings, params, strict=True)]


def _list_shapes(moments: Any, names: Sequence[str]) -> list[tuple[int, ...]]:
    found = [moments.get(key) for key in names] if isinstance(moments, dict) else []
    return [tuple(moment.shape) for moment in found if isinstance(moment, torch.Tensor)]


def from_adamw(adamw: Any, model_args: Mapping[str, Any], is_tied: bool) -> OptimizerState:
    """Names the moments of a torch.optim.AdamW state dict of any nanoGPT.

    Raises:
        ValueError: If it is not such a state dict, or none of nanoGPT's groupings fits its groups and shapes.
    """
    try:
        param_groups = [dict(group) for group in adamw["param_groups"]]
        numbers = [list(group.pop("params")) for group in param_groups]
        found = {number: dict(moments) for number, moments in adamw["state"].items()}
        settings = {number: group for group, own in zip(param_groups, numbers, strict=True) for number in own}
        found_shapes = {
            number: {tuple(m[name].shape) for name in list_moments(settings.get(number, {}))}
            for number, m in found.items()
        }
        are_numbers = all(type(number) is int for number in (*chain(*numbers), *found))
        if not are_numbers or any("step" not in moments for moments in found.values()):
            raise TypeError
        if not all(map(is_adamw, param_groups)):
            raise TypeError
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError("optimizer: expected a torch.optim.AdamW state dict, got something else") from error
    shapes = list_parameter_shapes(model_args, is_tied)
    for grouping in GROUPINGS:
        groups = grouping(list(shapes), shapes)
        names = groups[0] + groups[1]
        split = [list(range(len(groups[0]))), list(range(len(groups[0]), len(names)))]
        is_known = found.keys() <= set(range(len(names)))  # a parameter that was frozen has no moments
        if numbers == split and is_known and all(found_shapes[n] == {shapes[names[n]]} for n in found):
            moments = {names[number]: found[number] for number in sorted(found)}
            return OptimizerState((param_groups[0], param_groups[1]), moments, grouping)
    sizes = [[len(group) for group in grouping(list(shapes), shapes)] for grouping in GROUPINGS]
    raise ValueError(
        f"optimizer: expected nanoGPT's AdamW with groups of {' or '.join(map(str, sizes))} parameters and moments of "
        f"their shapes, got groups of {[len(group) for group in numbers]}"
    )


def number_parameters(adamw: Any, model_args: Mapping[str, Any], is_tied: bool) -> Any:
    """Returns a torch.optim.AdamW state dict with its parameters under their numbers, as torch.optim saves them.

    dcp_to_torch_save of torch.distributed.checkpoint turns keys into text, so the moments of parameter 0 are under
    "0"; get_state_dict of torch.distributed.checkpoint.state_dict names the parameters as the model does. An optimizer
    state that get_state_dict has flattened as well is not read.

    Args:
        adamw: The state dict, with parameters under numbers, under numbers as text, or under the model's names.
        model_args: nanoGPT's.
        is_tied: Whether lm_head is the token embedding.

    Returns:
        The same with numbers; `adamw` itself if it has another form.
    """
    if not isinstance(adamw, dict) or not isinstance(adamw.get("param_groups"), list):
        return adamw
    state, settings = adamw.get("state", {}), adamw["param_groups"]  # an empty state is not saved at all
    if not isinstance(state, dict) or not all(isinstance(group, dict) for group in settings):
        return adamw
    params = [group.get("params") for group in settings]
    if not all(isinstance(own, list) and all(isinstance(name, str) for name in own) for own in params):
        return {**adamw, "state": _rename_keys(state, map(_read_number, state))}

    def clean(name: Any) -> Any:
        name = strip_wrappers(name) if isinstance(name, str) else name
        return "transformer.wte.weight" if is_tied and name == "lm_head.weight" else name

    found = [sorted(map(clean, own)) for own in params]
    shapes = list_parameter_shapes(model_args, is_tied)
    for grouping in GROUPINGS:
        groups = grouping(list(shapes), shapes)
        if found == [sorted(group) for group in groups]:
            numbers, param_groups = _number_groups(groups, settings)
            state = _rename_keys(state, [numbers.get(clean(key), key) for key in state])
            return {"state": state, "param_groups": param_groups}
    return adamw


def _rename_keys(state: dict[Any, Any], keys: Iterable[Any]) -> dict[Any, Any]:
    renamed = dict(zip(keys, state.values(), strict=True))
    return renamed if len(renamed) == len(state) else state  # not if two keys became one


def _read_number(key: Any) -> Any:
    return int(key) if isinstance(key, str) and re.fullmatch(r"0|[1-9][0-9]{0,8}", key) else key


def make_fresh_state(config: Mapping[str, Any]) -> OptimizerState:
    """Makes the state of nanoGPT's optimizer before its first update.

    Args:
        config: train.py's settings. Only the optimizer's are used; missing ones have nanoGPT's defaults.
    """
    setting = {name: config.get(name, default) for name, default in _CONFIG_DEFAULTS.items()}
    parameters = [torch.nn.Parameter(torch.empty(0)) for _ in range(2)]  # torch adds the settings that it has
    groups = [
        {"params": parameters[:1], "weight_decay": setting["weight_decay"]},
        {"params": parameters[1:], "weight_decay": 0.0},
    ]
    betas = (setting["beta1"], setting["beta2"])
    adamw = torch.optim.AdamW(groups, lr=setting["learning_rate"], betas=betas).state_dict()
    decayed, others = ({key: v for key, v in group.items() if key != "params"} for group in adamw["param_groups"])
    return OptimizerState((decayed, others), {})
