"""Training in two processes on the CPU, compared with one process: DDP and FSDP2, 20 updates each.

First the updates of the recorded run, from nanoGPT's checkpoint with its moments: DDP with NanoGPTTrainer, FSDP2 in a
plain loop. Then a toy run of the command from scratch, with train.py's settings, stopped and resumed.
"""

import json
import shutil

import pytest
import torch

from hugging_nano_gpt import NanoGPTLMHeadModel, read_checkpoint
from hugging_nano_gpt.training import make_optimizer, read_optimizer

from ..helpers.comparison import assert_same
from ..helpers.distributed_worker import CHANGES, LONGER, SHORT
from ..helpers.processes import needs_gloo, run_two_processes
from ..helpers.reference_run import ReferenceRun, flatten_saved
from ..helpers.scripts import link_scripts, resume_trace, run_script, skip_without_nanogpt
from ..helpers.tiny import TORCH_VERSION
from ..helpers.toy_run import SETTINGS as TOY_SETTINGS
from ..helpers.toy_run import VOCAB_SIZE, flatten_checkpoint, list_differences, make_workplace, train
from ..helpers.trace import (
    CONFIG,
    START,
    STEPS,
    TOLERANCE,
    TRACE_DIR,
    find_largest_difference,
    flatten_moments,
    load_start,
    train_by_hand,
)

pytestmark = needs_gloo

N_UPDATES = 20
CKPT = "ckpt-0.pt"

needs_newer_torch = pytest.mark.skipif(TORCH_VERSION < (2, 7), reason="FSDP2 of torch 2.6 does not run on a CPU")
STRATEGIES = ["ddp", "train", *(["fsdp2", "train-fsdp2"] if TORCH_VERSION >= (2, 7) else [])]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder in which two processes wrote, for each strategy, a checkpoint and their own state, state.pt."""
    folder = tmp_path_factory.mktemp("distributed")
    for name in STRATEGIES:
        (folder / name).mkdir()
        if name.startswith("train"):
            make_workplace(folder / name)
    run_two_processes("distributed_worker", folder, *STRATEGIES)
    return folder


@pytest.fixture(scope="module", params=["ddp", pytest.param("fsdp2", marks=needs_newer_torch)])
def folder(request, folders):
    return folders / request.param


@pytest.fixture(scope="module", params=["train", pytest.param("train-fsdp2", marks=needs_newer_torch)])
def toy_folder(request, folders):
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


def test_checkpoint_of_two_processes_contains_their_state(folder):
    checkpoint, state = read_checkpoint(folder / CKPT), torch.load(folder / "state.pt", weights_only=True)
    assert_same(checkpoint.state_dict, dict(state["parameters"]))
    found = checkpoint.training_state.optimizer.moments
    assert found.keys() == state["moments"].keys()
    for name, moments in state["moments"].items():
        assert_same(found[name], {key: moments[key] for key in found[name]})


def test_checkpoint_of_two_processes_records_the_run(folder):
    checkpoint = read_checkpoint(folder / CKPT)
    state = checkpoint.training_state
    assert (state.iter_num, state.config) == (100 + N_UPDATES, CONFIG)
    assert {int(moments["step"]) for moments in state.optimizer.moments.values()} == {100 + N_UPDATES}
    # torch 2.6 lacks a setting of the torch that made the recording
    assert state.optimizer.settings[0].keys() <= START.training_state.optimizer.settings[0].keys()
    assert checkpoint.model_args == START.model_args


def test_of_two_processes_only_the_first_writes(folder):
    assert {path.name for path in folder.iterdir()} == {CKPT, "state.pt"}


@pytest.mark.nanogpt
@skip_without_nanogpt
def test_train_py_continues_from_two_processes_as_from_one(folder, tmp_path):
    link_scripts(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ckpt.pt").write_bytes((folder / CKPT).read_bytes())
    resumed = resume_trace(tmp_path, STEPS[N_UPDATES : N_UPDATES + 1])
    parameters, moments = train_alone(n_updates=N_UPDATES + 1)
    assert resumed.training_state.iter_num == 100 + N_UPDATES + 1
    assert find_largest_difference(resumed.state_dict, parameters) <= TOLERANCE
    assert find_largest_difference(flatten_moments(resumed.training_state.optimizer.moments), moments) <= TOLERANCE


def run_toy_alone(n_processes=2, **changes):
    """Makes the toy run in one process, with the batches of several processes."""
    settings = {**TOY_SETTINGS, **CHANGES, **changes}
    return flatten_saved(ReferenceRun(settings, TRACE_DIR, VOCAB_SIZE, n_processes=n_processes).run())


def test_toy_run_of_two_processes_stopped_and_resumed_ends_where_one_does(toy_folder):
    expected = run_toy_alone()
    assert find_largest_difference(flatten_checkpoint(toy_folder / "out" / "ckpt.pt"), expected) <= TOLERANCE
    for wrong in ({"n_processes": 1}, {"max_iters": 19, "eval_interval": 19}):  # shows that the comparison can fail
        assert find_largest_difference(run_toy_alone(**wrong), expected) > 100 * TOLERANCE


def test_toy_run_leaves_a_complete_ckpt_pt_and_one_checkpoint_of_trainer(toy_folder):
    assert {path.name for path in (toy_folder / "out").iterdir()} == {
        ".train.lock",
        "ckpt.pt",
        "checkpoint-20",
        "log.jsonl",
    }
    last = json.loads((toy_folder / "out" / "log.jsonl").read_text().splitlines()[-1])
    assert (last["iter"], last["tokens"]) == (20, 21 * 96)  # both processes' tokens, in a line of the first one
    weights = read_checkpoint(toy_folder / "out" / "ckpt.pt").state_dict
    saved = NanoGPTLMHeadModel.from_pretrained(toy_folder / "out" / "checkpoint-20")
    assert_same(weights, dict(saved.state_dict()))


# The sums of chunks are rounded in another order; bfloat16 keeps 8 bits.
@needs_newer_torch
@pytest.mark.parametrize(("way", "least", "most"), [("lean", 0.0, TOLERANCE), ("bf16", 1e-4, 0.05)])
def test_sharded_toy_run_that_saves_memory_ends_near_one_that_does_not(folders, way, least, most):
    found = flatten_checkpoint(folders / "train-fsdp2" / way / "ckpt.pt")
    assert least < find_largest_difference(found, run_toy_alone(**SHORT)) < most


@needs_newer_torch
def test_sharded_and_compiled_toy_run_stopped_and_resumed_ends_where_one_does(tmp_path):
    folder = tmp_path / "train-compiled"
    folder.mkdir()
    make_workplace(folder)
    run_two_processes("distributed_worker", tmp_path, "train-compiled")
    found = flatten_checkpoint(folder / "out" / "ckpt.pt")
    assert find_largest_difference(found, run_toy_alone(**LONGER)) <= TOLERANCE


@pytest.mark.nanogpt
@skip_without_nanogpt
def test_train_py_resumes_the_toy_run_of_two_processes(toy_folder, tmp_path):
    """Compared with the command in one process, from the same ckpt.pt."""
    changes = {**CHANGES, "init_from": "resume", "max_iters": 24, "eval_interval": 4}
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    make_workplace(theirs)
    for folder in (tmp_path, theirs):
        (folder / "out").mkdir()
        shutil.copy(toy_folder / "out" / "ckpt.pt", folder / "out")
    link_scripts(theirs)
    run_script(theirs, "train.py", *(f"--{name}={value}" for name, value in {**TOY_SETTINGS, **changes}.items()))
    train(tmp_path, **changes)
    found, expected = (flatten_checkpoint(folder / "out" / "ckpt.pt") for folder in (tmp_path, theirs))
    assert int(expected["iter_num"]) == 24
    assert list_differences(found, expected) == []
