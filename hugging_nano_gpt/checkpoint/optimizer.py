"""AdamW's state by parameter name, and the two ways in which nanoGPT has numbered its parameters.

torch.optim saves moments under numbers, and which tensor is number 7 depends on how the code of the day grouped them.
Read by name and written in today's order, the moments of every era resume in today's train.py. A state that fits none
of the groupings, or that does not fit by shape, is refused and never guessed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from ..errors import join_some
from .tensors import iterate_shapes

Names = list[str]

# What AdamW keeps for each parameter next to the step count, all of the parameter's shape; and with amsgrad.
_MOMENTS = ("exp_avg", "exp_avg_sq")
_AMSGRAD_MOMENTS = (*_MOMENTS, "max_exp_avg_sq")

# The settings of every AdamW since torch 1.2; RAdam, NAdam and SGD lack some.
_SETTINGS = {"lr", "betas", "eps", "weight_decay", "amsgrad"}

# AdamW as nanoGPT sets it up when nothing else is said (train.py @ 3adf61e): the config's names and their defaults.
_CONFIG_DEFAULTS = {"learning_rate": 6e-4, "weight_decay": 1e-1, "beta1": 0.9, "beta2": 0.95}


def group_by_dimension(names: Names, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Names, Names]:
    """Decays what has two or more dimensions, in the order of named_parameters (since 7fe4a099, 2023-05-06)."""
    return [name for name in names if len(shapes[name]) >= 2], [name for name in names if len(shapes[name]) < 2]


def group_by_module(names: Names, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Names, Names]:
    """Decays the weights of Linear modules but no embedding, names sorted (before 7fe4a099, 2023-05-06)."""
    embeddings = ("transformer.wte.weight", "transformer.wpe.weight")
    decayed = [name for name in names if len(shapes[name]) >= 2 and name not in embeddings]
    return sorted(decayed), sorted(set(names) - set(decayed))


GROUPINGS: tuple[Callable[[Names, Mapping[str, tuple[int, ...]]], tuple[Names, Names]], ...] = (
    group_by_dimension,
    group_by_module,
)


@dataclass(frozen=True)
class OptimizerState:
    """The state of nanoGPT's AdamW.

    Args:
        settings: lr, betas, eps, weight_decay and the rest of the two parameter groups: the decayed and the others.
        moments: By parameter name: step (a float32 scalar), exp_avg and exp_avg_sq (of the parameter's shape). Empty
            before the first update.
        grouping: How the file grouped the parameters.
    """

    settings: tuple[dict[str, Any], dict[str, Any]]
    moments: dict[str, dict[str, Any]]
    grouping: Callable = group_by_dimension

    def find_faults(self, model_args: Mapping[str, Any]) -> list[str]:
        """Finds moments that are not of nanoGPT's model of these model_args, a sentence each."""
        if len(self.settings) != 2 or not all(isinstance(value, dict) for value in (*self.settings, self.moments)):
            return ["optimizer: expected settings of two groups and a dict of moments, got others"]
        shapes = list_parameter_shapes(model_args, is_tied=True)
        wrong = []
        for name, moments in self.moments.items():
            expected = list_moments(self.settings[len(shapes.get(name, ())) < 2])
            found = _list_shapes(moments, expected)
            if found != [shapes.get(name)] * len(expected):
                wrong.append(
                    f"{name!r}: expected {', '.join(expected)} of {shapes.get(name, 'no parameter')}, got {found}"
                )
        wrong += [
            f"{name!r}: expected a step, got none"
            for name, m in self.moments.items()
            if isinstance(m, dict) and "step" not in m
        ]
        return [f"optimizer: {join_some(wrong)}"] if wrong else []

    def to_adamw(self, model_args: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the torch.optim.AdamW state dict for today's nanoGPT, in its groups and its order."""
        shapes = list_parameter_shapes(model_args, is_tied=True)
        groups = group_by_dimension(list(shapes), shapes)
        numbers = {name: number for number, name in enumerate(groups[0] + groups[1])}
        param_groups = [
            {**settings, "params": [numbers[name] for name in group]}
            for settings, group in zip(self.settings, groups, strict=True)
        ]
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


def make_fresh_state(config: Mapping[str, Any]) -> OptimizerState:
    """Makes the state of nanoGPT's optimizer before its first update.

    Args:
        config: train.py's settings; those of the optimizer are used, nanoGPT's defaults stand in for missing ones.
    """
    setting = {name: config.get(name, default) for name, default in _CONFIG_DEFAULTS.items()}
    parameters = [torch.nn.Parameter(torch.empty(0)) for _ in range(2)]  # torch fills in the settings that it has
    groups = [
        {"params": parameters[:1], "weight_decay": setting["weight_decay"]},
        {"params": parameters[1:], "weight_decay": 0.0},
    ]
    betas = (setting["beta1"], setting["beta2"])
    adamw = torch.optim.AdamW(groups, lr=setting["learning_rate"], betas=betas).state_dict()
    decayed, others = ({key: v for key, v in group.items() if key != "params"} for group in adamw["param_groups"])
    return OptimizerState((decayed, others), {})


def list_parameter_shapes(model_args: Mapping[str, Any], is_tied: bool) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the parameters in the order of named_parameters, the tied matrix once."""
    shapes = dict(iterate_shapes(dict(model_args)))
    if is_tied:
        del shapes["lm_head.weight"]
    return shapes
