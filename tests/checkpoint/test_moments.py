"""checkpoint/moments.py: moments get the names of their parameters or are refused; only a whole state is written."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hugging_nano_gpt import CheckpointError, read_checkpoint, write_checkpoint

from ..helpers.comparison import assert_same, assert_write_refused
from ..helpers.contents import save

HEAD, LN = "lm_head.weight", "transformer.h.1.ln_1.weight"


def list_names(contents):
    """Lists the parameters in the order in which today's nanoGPT numbers them: the matrices, then the vectors."""
    shapes = {name: tensor.ndim for name, tensor in contents["model"].items() if name != HEAD}
    return [name for name in shapes if shapes[name] == 2] + [name for name in shapes if shapes[name] == 1]


def group_as_before_may_2023(contents):
    """Renumbers the moments: the weights of linear layers in alphabetical order, then all else."""
    names = list_names(contents)
    decayed = sorted(name for name in names[:10] if ".h." in name)
    order = decayed + sorted(set(names) - set(decayed))
    moments = dict(zip(names, contents["optimizer"]["state"].values(), strict=True))
    contents["optimizer"]["state"] = {number: moments[name] for number, name in enumerate(order)}
    for group, numbers in zip(contents["optimizer"]["param_groups"], (range(8), range(8, 28)), strict=True):
        group["params"] = list(numbers)


@pytest.mark.parametrize(
    "regroup", [lambda contents: None, group_as_before_may_2023], ids=["today", "before May 2023"]
)
def test_read_moments_get_the_names_of_their_parameters(contents, tmp_path, regroup):
    names, expected = list_names(contents), contents["optimizer"]["state"]
    regroup(contents)
    path = save(contents, tmp_path)
    checkpoint = read_checkpoint(path)
    assert_same(
        {name: checkpoint.training_state.optimizer.moments[name] for name in names},
        dict(zip(names, expected.values(), strict=True)),
    )
    write_checkpoint(checkpoint, path, overwrite=True)
    written = torch.load(path, weights_only=True)["optimizer"]
    assert_same(written["state"], expected)
    assert [group["params"] for group in written["param_groups"]] == [list(range(10)), list(range(10, 28))]


def test_read_moments_of_other_groups_get_other_names(contents, tmp_path):
    """Shows that the comparison of the test above can fail: two layers' moments, of the same shapes, are swapped."""
    names, state = list_names(contents), contents["optimizer"]["state"]
    first, second = (names.index(f"transformer.h.{layer}.attn.c_proj.weight") for layer in range(2))
    moments = read_checkpoint(save(contents, tmp_path)).training_state.optimizer.moments
    state[first], state[second] = state[second], state[first]
    swapped = read_checkpoint(save(contents, tmp_path)).training_state.optimizer.moments
    with pytest.raises(AssertionError, match=r"torch\.equal"):
        assert_same(moments, swapped)


def test_read_without_optimizer_does_not_touch_it(contents, tmp_path):
    """A damaged optimizer goes unnoticed when it is not wanted, and only then."""
    path = save(contents, tmp_path)
    moment = bytes(contents["optimizer"]["state"][3]["exp_avg"].numpy())
    path.write_bytes(path.read_bytes().replace(moment, moment[::-1]))
    checkpoint = read_checkpoint(path, with_optimizer=False)
    assert checkpoint.training_state.optimizer is None
    assert checkpoint.training_state.iter_num == 7
    assert_same(checkpoint.state_dict, contents["model"])
    with pytest.raises(CheckpointError, match="a wrong checksum"):
        read_checkpoint(path)


def test_write_without_optimizer_writes_a_fresh_one_with_the_settings_of_the_run(contents, tmp_path):
    path = save(contents, tmp_path)
    write_checkpoint(read_checkpoint(path, with_optimizer=False), path, overwrite=True)
    written = torch.load(path, weights_only=True)["optimizer"]
    assert written["state"] == {}
    assert [group.pop("params") for group in written["param_groups"]] == [list(range(10)), list(range(10, 28))]
    for group, weight_decay in zip(written["param_groups"], (0.1, 0.0), strict=True):
        made = torch.optim.AdamW([torch.ones(1)], lr=1e-3, betas=(0.9, 0.95), weight_decay=weight_decay)
        expected = made.state_dict()["param_groups"][0]
        assert {**group, "params": [0]} == expected
    assert read_checkpoint(path).training_state.optimizer.moments == {}


# Reading faulty states.


def change_state(number, **values) -> Callable:
    return lambda adamw: adamw["state"][number].update(values)


def change_groups(change) -> Callable:
    return lambda adamw: adamw.update(param_groups=change(adamw["param_groups"]))


def number_by(change) -> Callable:
    return lambda adamw: adamw.update(state={change(number): moments for number, moments in adamw["state"].items()})


def number_as_named_parameters(adamw):
    """The first two fit, the third does not."""
    moments = list(adamw["state"].values())
    adamw["state"] = dict(enumerate(moments[:2] + moments[10:] + moments[2:10]))


# tests/checkpoint/test_family.py has more, with the demo's state.
FAULTY_ADAMW: dict[str, Callable[[dict[str, Any]], Any]] = {
    "not a state dict": lambda adamw: adamw.clear(),
    "no groups": change_groups(lambda groups: []),
    "groups swapped": change_groups(lambda groups: groups[::-1]),
    "group is no dict": change_groups(lambda groups: [1, 2]),
    "group without params": change_groups(lambda groups: [{}, {}]),
    "params is a number": change_groups(lambda groups: [{"params": 3}, groups[1]]),
    "params is a tensor": change_groups(lambda groups: [{"params": torch.arange(10)}, groups[1]]),
    "state is a list": lambda adamw: adamw.update(state=[]),
    "state of a parameter is a number": lambda adamw: adamw["state"].update({0: 5}),
    "numbered by words": number_by("number {}".format),
    "numbered by text of another form": number_by("{:03}".format),
    "numbered twice": lambda adamw: adamw["state"].update({"0": adamw["state"][1]}),
    "numbered by floats": number_by(float),
    "numbered by complex numbers": number_by(complex),
    "numbered by tensors": number_by(lambda number: torch.tensor([number, number])),
    "numbered as named_parameters": number_as_named_parameters,
    "moment is a number": change_state(0, exp_avg=1),
    "moment of other shape": change_state(0, exp_avg=torch.ones(3)),
    "no second moment": lambda adamw: adamw["state"][0].pop("exp_avg_sq"),
    "no step": lambda adamw: adamw["state"][0].pop("step"),
    "no amsgrad, as in RAdam": lambda adamw: adamw["param_groups"][1].pop("amsgrad"),
    "Adam": lambda adamw: adamw["param_groups"][0].update(decoupled_weight_decay=False),
    "amsgrad without its moment": lambda adamw: adamw["param_groups"][0].update(amsgrad=True),
}


@pytest.mark.parametrize("name", FAULTY_ADAMW)
def test_read_faulty_optimizer_is_refused_but_the_model_is_read(contents, tmp_path, name):
    FAULTY_ADAMW[name](contents["optimizer"])
    path = save(contents, tmp_path)
    assert_same(read_checkpoint(path, with_optimizer=False).state_dict, contents["model"])
    message = r"cannot be named with certainty: optimizer: expected .*, got .*; .* with_optimizer=False"
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


# Writing states that nanoGPT could not resume from.


def change_moments(**values) -> Callable:
    """Changes the moments of one vector of 32; None removes one."""

    def change(optimizer):
        moments = {key: value for key, value in (optimizer.moments[LN] | values).items() if value is not None}
        return replace(optimizer, moments={**optimizer.moments, LN: moments})

    return change


FAULTY_STATES: dict[str, tuple[Callable, str]] = {
    "AdamW state dict": (lambda optimizer: {"state": {}, "param_groups": []}, "expected"),
    "settings of one group": (lambda optimizer: replace(optimizer, settings=optimizer.settings[:1]), "expected"),
    "settings of three groups": (lambda optimizer: replace(optimizer, settings=({}, {}, {})), "expected"),
    "settings are numbers": (lambda optimizer: replace(optimizer, settings=(1, 2)), "expected"),
    "setting of another class": (
        lambda optimizer: replace(optimizer, settings=({"lr": Path("lr.txt")}, {})),
        r"'lr'\]: expected plain Python types, got P",
    ),
    "moments of no parameter": (
        lambda optimizer: replace(optimizer, moments={**optimizer.moments, "value": optimizer.moments[LN]}),
        "'value': expected exp_avg, exp_avg_sq of no parameter",
    ),
    "moments are a number": (
        lambda optimizer: replace(optimizer, moments={**optimizer.moments, LN: 5}),
        f"'{LN}'.*expected",
    ),
    "all moments wrong": (
        lambda optimizer: replace(optimizer, moments={name: {"step": 1.0} for name in optimizer.moments}),
        r"expected exp_avg, exp_avg_sq of \(65, 32\), got \[\], .*\(28 in all\)",
    ),
    "moment of other shape": (
        change_moments(exp_avg=torch.ones(3)),
        rf"'{LN}': expected exp_avg, exp_avg_sq of \(32,\), got \[\(3,\), \(32,\)\]",
    ),
    "no second moment": (
        change_moments(exp_avg_sq=None),
        rf"'{LN}': expected exp_avg, exp_avg_sq of .* got \[\(32,\)\]",
    ),
    "amsgrad without its moment": (
        lambda optimizer: replace(optimizer, settings=({"amsgrad": True}, {})),
        r"expected exp_avg, exp_avg_sq, max_exp_avg_sq of \(65, 32\), got \[\(65, 32\), \(65, 32\)\]",
    ),
    "no step": (change_moments(step=None), f"'{LN}'.*expected"),
    "moment is a number": (change_moments(exp_avg=1), f"'{LN}'.*expected"),
    "sparse moment": (change_moments(exp_avg=torch.ones(32).to_sparse()), f"'{LN}'.*expected"),
    "meta moment": (change_moments(exp_avg=torch.ones(32, device="meta")), f"'{LN}'.*expected"),
    "expanded moment": (change_moments(exp_avg=torch.ones(1).expand(32)), f"'{LN}'.*expected"),
}


@pytest.mark.parametrize("name", FAULTY_STATES)
def test_write_faulty_optimizer_is_refused(checkpoint, tmp_path, name):
    change, message = FAULTY_STATES[name]
    state = checkpoint.training_state
    wrong = replace(checkpoint, training_state=replace(state, optimizer=change(state.optimizer)))
    assert_write_refused(wrong, tmp_path, f"optimizer.*{message}")
