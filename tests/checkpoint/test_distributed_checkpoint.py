"""Files that torch.distributed.checkpoint and dcp_to_torch_save make of a checkpoint are read, with their moments."""

import warnings

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from hugging_nano_gpt import CheckpointError, read_checkpoint
from hugging_nano_gpt.checkpoint.moments import group_by_module

from ..helpers.comparison import assert_same
from ..helpers.tiny import FIXTURES_DIR

FIXTURES = ["nanogpt-head-nobias", "nanogpt-2022-12-28-fe804286"]
HEAD = FIXTURES_DIR / FIXTURES[0] / "ckpt.pt"


def convert(state, folder):
    """Does what a user does: saves with torch.distributed, in one process, and makes a file of the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about having one process, and about torch.load without weights_only
        dcp.save(state, checkpoint_id=folder / "dcp")
    dcp_to_torch_save(folder / "dcp", folder / "ckpt.pt")
    return folder / "ckpt.pt"


def name_parameters(path):
    """Returns a fixture's dict as get_state_dict makes it: parameters by name, wrapped, in another order."""
    contents = torch.load(path, weights_only=True)
    expected = read_checkpoint(path).training_state.optimizer
    first, second = contents["optimizer"]["param_groups"]
    decayed = [name for name, moments in expected.moments.items() if is_decayed(name, moments, expected.grouping)]
    others = [name for name in expected.moments if name not in decayed]
    groups = [
        {**settings, "params": [f"_orig_mod.{name}" for name in reversed(names)]}
        for settings, names in ((first, decayed), (second, others))
    ]
    state = {f"_orig_mod.{name}": moments for name, moments in reversed(expected.moments.items())}
    return {"model": contents["model"], "optim": {"state": state, "param_groups": groups}}, contents["model_args"]


def is_decayed(name, moments, grouping):
    is_embedding = grouping is group_by_module and name in ("transformer.wte.weight", "transformer.wpe.weight")
    return moments["exp_avg"].ndim >= 2 and not is_embedding


def assert_same_state(found, expected):
    assert_same(found.state_dict, expected.state_dict)
    assert found.training_state.optimizer.grouping is expected.training_state.optimizer.grouping
    assert found.training_state.optimizer.settings == expected.training_state.optimizer.settings
    assert_same(found.training_state.optimizer.moments, expected.training_state.optimizer.moments)


@pytest.mark.parametrize("fixture", FIXTURES)
def test_whole_checkpoint_is_read_with_its_moments(tmp_path, fixture):
    path = FIXTURES_DIR / fixture / "ckpt.pt"
    expected, found = read_checkpoint(path), read_checkpoint(convert(torch.load(path, weights_only=True), tmp_path))
    assert_same_state(found, expected)
    assert found.model_args == expected.model_args
    assert found.training_state.config == expected.training_state.config


@pytest.mark.parametrize("fixture", FIXTURES)
def test_model_and_optimizer_alone_are_read_by_the_names_of_the_parameters(tmp_path, fixture):
    path = FIXTURES_DIR / fixture / "ckpt.pt"
    state, model_args = name_parameters(path)
    found = read_checkpoint(convert(state, tmp_path), n_head=model_args["n_head"])
    assert_same_state(found, read_checkpoint(path))
    assert "dropout 0.0, and sizes as its tensors have: there are no model_args" in found.assumptions


def test_model_alone_is_read_with_n_head_and_refused_without(tmp_path):
    contents = torch.load(HEAD, weights_only=True)
    path = convert({"model": contents["model"]}, tmp_path)
    found = read_checkpoint(path, n_head=contents["model_args"]["n_head"])
    assert_same(found.state_dict, contents["model"])
    assert found.model_args == {**contents["model_args"], "dropout": 0.0}
    with pytest.raises(CheckpointError, match=r"missing 'model_args', or n_head= \(--n-head\) instead"):
        read_checkpoint(path)


def test_optimizer_before_its_first_update_is_read(tmp_path):
    contents = torch.load(HEAD, weights_only=True)
    contents["optimizer"]["state"] = {}  # which is not saved at all
    found = read_checkpoint(convert(contents, tmp_path)).training_state.optimizer
    assert found.moments == {}
    assert found.settings == read_checkpoint(HEAD).training_state.optimizer.settings


def test_names_in_other_groups_are_refused(tmp_path):
    state, model_args = name_parameters(HEAD)
    first, second = state["optim"]["param_groups"]
    second["params"].append(first["params"].pop())
    path = convert(state, tmp_path)
    with pytest.raises(CheckpointError, match="optimizer state cannot be named with certainty"):
        read_checkpoint(path, n_head=model_args["n_head"])
    assert_same(read_checkpoint(path, n_head=model_args["n_head"], with_optimizer=False).state_dict, state["model"])
