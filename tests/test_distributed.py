"""Training in two processes on the CPU: DDP through NanoGPTTrainer, FSDP2 in a plain loop.

Each makes 20 updates of the recorded run from nanoGPT's checkpoint with its moments, and is held against one process.
"""

import pytest
import torch

from hugging_nano_gpt import read_checkpoint
from hugging_nano_gpt.training import make_optimizer, read_optimizer

from .conftest import assert_same
from .processes import needs_gloo, run_two_processes
from .scripts import link_scripts, resume_trace, skip_without_nanogpt
from .tiny import TORCH_VERSION
from .trace import (
    CONFIG,
    START,
    STEPS,
    TOLERANCE,
    find_largest_difference,
    flatten_moments,
    load_start,
    train_by_hand,
)

pytestmark = needs_gloo

N_UPDATES = 20
CKPT = "ckpt-0.pt"

needs_newer_torch = pytest.mark.skipif(TORCH_VERSION < (2, 7), reason="FSDP2 of torch 2.6 does not run on a CPU")
STRATEGIES = ["ddp", *(["fsdp2"] if TORCH_VERSION >= (2, 7) else [])]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Where two processes left a checkpoint for each strategy, and in held.pt what they held."""
    folder = tmp_path_factory.mktemp("distributed")
    for name in STRATEGIES:
        (folder / name).mkdir()
    run_two_processes("distributed_worker", folder, *STRATEGIES)
    return folder


@pytest.fixture(scope="module", params=["ddp", pytest.param("fsdp2", marks=needs_newer_torch)])
def folder(request, folders):
    return folders / request.param


@pytest.fixture(scope="module")
def expected():
    """Parameters and moments after the same updates in one process."""
    return train_alone()


def train_alone(state=START.training_state.optimizer, rows=slice(None), n_updates=N_UPDATES):
    model = load_start().train()
    optimizer = make_optimizer(model, CONFIG, state)
    train_by_hand(model, optimizer, STEPS[:n_updates], rows)
    return model.state_dict(), flatten_moments(read_optimizer(optimizer, model).moments)


def test_two_processes_end_where_one_does(folder, expected):
    checkpoint = read_checkpoint(folder / CKPT)
    moments = flatten_moments(checkpoint.training_state.optimizer.moments)
    assert find_largest_difference(checkpoint.state_dict, expected[0]) <= TOLERANCE
    assert find_largest_difference(moments, expected[1]) <= TOLERANCE


@pytest.mark.parametrize("wrong", [{"rows": slice(0, 4)}, {"state": None}], ids=["half the batch", "no moments"])
def test_one_process_with_one_thing_wrong_ends_elsewhere(expected, wrong):
    """Shows that the comparison can fail."""
    assert find_largest_difference(train_alone(**wrong)[0], expected[0]) > 100 * TOLERANCE


def test_checkpoint_of_two_processes_holds_what_they_held(folder):
    checkpoint, held = read_checkpoint(folder / CKPT), torch.load(folder / "held.pt", weights_only=True)
    assert_same(checkpoint.state_dict, dict(held["parameters"]))
    found = checkpoint.training_state.optimizer.moments
    assert found.keys() == held["moments"].keys()
    for name, moments in held["moments"].items():
        assert_same(found[name], {key: moments[key] for key in found[name]})


def test_checkpoint_of_two_processes_says_where_the_run_stands(folder):
    checkpoint = read_checkpoint(folder / CKPT)
    state = checkpoint.training_state
    assert (state.iter_num, state.config) == (100 + N_UPDATES, CONFIG)
    assert {int(moments["step"]) for moments in state.optimizer.moments.values()} == {100 + N_UPDATES}
    # torch 2.6 lacks one setting of the torch that wrote the recording
    assert state.optimizer.settings[0].keys() <= START.training_state.optimizer.settings[0].keys()
    assert checkpoint.model_args == START.model_args


def test_of_two_processes_only_the_first_writes(folder):
    assert {path.name for path in folder.iterdir()} == {CKPT, "held.pt"}


@pytest.mark.nanogpt
@skip_without_nanogpt
def test_train_py_goes_on_from_two_processes_as_from_one(folder, tmp_path):
    link_scripts(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ckpt.pt").write_bytes((folder / CKPT).read_bytes())
    resumed = resume_trace(tmp_path, STEPS[N_UPDATES : N_UPDATES + 1])
    parameters, moments = train_alone(n_updates=N_UPDATES + 1)
    assert resumed.training_state.iter_num == 100 + N_UPDATES + 1
    assert find_largest_difference(resumed.state_dict, parameters) <= TOLERANCE
    assert find_largest_difference(flatten_moments(resumed.training_state.optimizer.moments), moments) <= TOLERANCE
