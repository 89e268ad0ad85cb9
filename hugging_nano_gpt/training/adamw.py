"""nanoGPT's AdamW over a model's parameters, with a checkpoint's moments; and the moments of any AdamW by name."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..checkpoint.layout import strip_wrappers
from ..checkpoint.moments import OptimizerState, group_by_dimension, is_adamw, make_fresh_state
from ..errors import ConversionError, join_some, list_some

# The settings that decide what an update computes, except the learning rate, which train.py sets before each.
_DECISIVE = ("betas", "eps", "weight_decay", "amsgrad", "maximize")


def make_optimizer(
    model: nn.Module, config: Mapping[str, Any] | None = None, state: OptimizerState | None = None
) -> torch.optim.AdamW:
    """Makes the optimizer that nanoGPT makes: weight decay for tensors of two or more dimensions, none for the others.

    With a state, groups, their order, every setting, moment and step count equal nanoGPT's after it has resumed.
    Without one, it is the fused AdamW on CUDA, as in nanoGPT.

    Args:
        model: The model to train; parameters that need no gradient are left out.
        config: train.py's settings learning_rate, weight_decay, beta1 and beta2; missing ones are train.py's defaults.
            Not read if there is a state, which has its own.
        state: A checkpoint's `training_state.optimizer`.

    Raises:
        ConversionError: If the state has moments of other parameters than the model's.
    """
    parameters = {name: parameter for name, parameter in _name_parameters(model).items() if parameter.requires_grad}
    groups = group_by_dimension(list(parameters), {name: parameter.shape for name, parameter in parameters.items()})
    settings = (make_fresh_state(config or {}) if state is None else state).settings
    if state is None and all(parameter.is_cuda for parameter in parameters.values()):
        settings = ({**settings[0], "fused": True}, {**settings[1], "fused": True})
    optimizer = torch.optim.AdamW(
        [{"params": [parameters[name] for name in group]} for group in groups],
        fused=settings[0].get("fused"),  # a GradScaler asks the optimizer itself
    )
    numbers = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    param_groups = [{**own, "params": group} for own, group in zip(settings, numbers, strict=True)]
    optimizer.load_state_dict({"state": {}, "param_groups": param_groups})  # sets all, as when train.py resumes
    if state is not None and state.moments:
        load_moments(optimizer, model, state)
    return optimizer


def load_moments(optimizer: torch.optim.Optimizer, model: nn.Module, state: OptimizerState) -> None:
    """Loads the moments of a checkpoint into an AdamW over a model's parameters, grouped in any way.

    The moments are copied to each parameter's device, and the state is not changed. Moments of sharded parameters
    (FSDP2) are sharded too, and then every process has to call this.

    Raises:
        ConversionError: If the names or shapes of the moments are not those of the optimizer's parameters.
    """
    names = {id(parameter): name for name, parameter in _name_parameters(model).items()}
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    order = [names.get(id(parameter), "?") for parameter in trained]
    missing = sorted(set(order) - state.moments.keys())
    unknown = sorted(state.moments.keys() - set(order))
    if missing or unknown:
        raise ConversionError(
            f"optimizer state: expected moments of the optimizer's parameters, missing {list_some(missing) or 'none'}"
            f", got others {list_some(unknown) or 'none'}; train the parameters that the checkpoint trained, or start "
            f"afresh"
        )
    wrong = [
        f"{name} of {tuple(state.moments[name]['exp_avg'].shape)} for {tuple(parameter.shape)}"
        for name, parameter in zip(order, trained, strict=True)
        if state.moments[name]["exp_avg"].shape != parameter.shape
    ]
    if wrong:
        raise ConversionError(
            f"optimizer state: expected moments of the parameters' shapes, got {join_some(wrong)}; crop or resize the "
            f"model after training, or start afresh: replace(training_state, optimizer=None)"
        )
    raw = optimizer.state_dict()
    numbers = [number for group in raw["param_groups"] for number in group["params"]]
    moments = {
        number: {key: _copy_like(value, parameter) for key, value in state.moments[name].items()}
        for number, name, parameter in zip(numbers, order, trained, strict=True)
    }
    optimizer.load_state_dict({"state": moments, "param_groups": raw["param_groups"]})


def read_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> OptimizerState:
    """Returns the moments of an AdamW, Trainer's included, by the names of the model's parameters.

    The tensors are copied to the CPU, so training may continue. Sharded moments (FSDP2) are gathered, for which every
    process has to call this.

    Raises:
        ConversionError: If the optimizer is not torch's AdamW or an Adam that decays weights in the same way; if it
            trains other parameters than the model has, or the parameters of one of nanoGPT's two groups with different
            settings.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # in Accelerate's wrapper
    _refuse_other_optimizers(optimizer)
    names = {id(parameter): name for name, parameter in _name_parameters(model).items()}
    trained = [(names.get(id(p)), p, group) for group in optimizer.param_groups for p in group["params"]]
    if any(name is None for name, _, _ in trained) or len(trained) != len(names):
        raise ConversionError(
            f"optimizer: expected one over all {len(names)} parameters of the model, got {len(trained)} parameters, "
            f"{sum(name is None for name, _, _ in trained)} of them not the model's; give the model that it trains"
        )
    kept = {name: (parameter, group) for name, parameter, group in trained if name}
    groups = group_by_dimension(list(kept), {name: parameter.shape for name, (parameter, _) in kept.items()})
    decayed, others = (_read_settings([kept[name][1] for name in group]) for group in groups)
    states = {name: optimizer.state.get(kept[name][0], {}) for name in names.values()}
    moments = {name: {key: _gather(value) for key, value in own.items()} for name, own in states.items() if own}
    return OptimizerState(settings=(decayed, others), moments=moments)


def _name_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns a model's parameters by nanoGPT's names, without what torch.compile or DDP put before them.

    FSDP2 leaves parameters whole after a forward pass without a backward pass. They are sharded again, as they are in
    the optimizer.
    """
    for module in model.modules():
        reshard = getattr(module, "reshard", None)
        if reshard is not None:
            reshard()
    return {strip_wrappers(name): parameter for name, parameter in model.named_parameters()}


def _gather(value: Any) -> torch.Tensor:
    """Returns a copy of a tensor on the CPU; a sharded one is gathered, and every process has to call this."""
    tensor = value if isinstance(value, torch.Tensor) else torch.tensor(float(value))
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.detach().to("cpu", copy=True)


def _copy_like(moment: torch.Tensor, parameter: Any) -> torch.Tensor:
    """Copies a moment, because torch trains it in place, and shards it if its parameter is sharded."""
    copy = moment.clone()
    if moment.ndim and hasattr(parameter, "full_tensor"):  # AdamW keeps the step count whole
        from torch.distributed.tensor import distribute_tensor  # not in every build of torch

        return distribute_tensor(copy, parameter.device_mesh, parameter.placements)
    return copy


def _refuse_other_optimizers(optimizer: torch.optim.Optimizer) -> None:
    kind = type(optimizer)
    unrecorded = {} if kind is torch.optim.AdamW else {"decoupled_weight_decay": False}  # before torch 2.7
    are_adamw = all(is_adamw({**unrecorded, **group}) for group in optimizer.param_groups)
    if kind not in (torch.optim.AdamW, torch.optim.Adam) or not are_adamw:
        raise ConversionError(
            f"optimizer: expected torch.optim.AdamW, as nanoGPT has, got {kind.__module__}.{kind.__name__}, which "
            f"computes other updates; write the checkpoint without optimizer=, from which train.py begins afresh"
        )


def _read_settings(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns AdamW's own settings for one of nanoGPT's groups, not those that others added, such as initial_lr."""
    several = [name for name in _DECISIVE if any(group.get(name) != groups[0].get(name) for group in groups)]
    if several:
        raise ConversionError(
            f"optimizer: expected one value for all matrices and one for all vectors, which are nanoGPT's groups, got "
            f"more of {list_some(several)}; write the checkpoint without optimizer="
        )
    known = make_fresh_state({}).settings[0]
    settings = {key: groups[0][key] for key in known if key in groups[0]}
    return {key: float(value) if isinstance(value, torch.Tensor) else value for key, value in settings.items()}
