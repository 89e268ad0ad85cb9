"""The examples run as written, and so does the Python of docs/training.md, whose tables are those of the code."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hugging_nano_gpt import read_checkpoint
from hugging_nano_gpt.demo import CKPT_PATH
from hugging_nano_gpt.training import TokenDataset, training_arguments_from_nanogpt

from .processes import needs_gloo
from .scripts import NANOGPT_DIR, skip_without_nanogpt
from .test_tensor_parallel import IS_RECENT

ROOT = Path(__file__).parents[1]
EXAMPLES_DIR = ROOT / "examples"
GUIDE = (ROOT / "docs" / "training.md").read_text()
N_ITERATIONS = 5000  # of the demo checkpoint

# Each takes about ten seconds; a busy machine has taken 45.
TIMEOUT_S = 240


def run_example(*command, cwd=ROOT):
    """Runs a command; returns the lines that it prints."""
    environment = {**os.environ, "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(list(map(str, command)), cwd=cwd, env=environment, **pipes) as process:
        try:
            output, errors = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.terminate()
            raise
    assert process.returncode == 0, errors
    return output.splitlines()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """What the examples train on."""
    folder = tmp_path_factory.mktemp("shakespeare_char")
    assert run_example(sys.executable, EXAMPLES_DIR / "shakespeare_sample.py", folder) == [f"Wrote {folder}"]
    return folder


def test_sampled_data_are_in_the_format_of_prepare_py(data_dir):
    assert {path.name for path in data_dir.iterdir()} == {"train.bin", "val.bin", "meta.pkl"}
    for split in ("train", "val"):
        dataset = TokenDataset(data_dir / f"{split}.bin", 128)
        assert all(0 <= token < 65 for token in dataset[len(dataset) - 1]["shift_labels"].tolist())


def test_resume_in_trainer_goes_on_with_the_run(tmp_path):
    *_, claim, place = run_example(sys.executable, EXAMPLES_DIR / "resume_in_trainer.py", tmp_path)
    assert re.fullmatch(r"Continued to iteration 5040, validation loss \d\.\d{4} to \d\.\d{4}\.", claim)
    assert place == f"Wrote {tmp_path / 'ckpt.pt'}"


def test_back_to_nanogpt_ends_as_a_checkpoint_of_nanogpts(tmp_path):
    *_, claim, place = run_example(sys.executable, EXAMPLES_DIR / "back_to_nanogpt.py", tmp_path)
    assert claim == "Back in nanoGPT's format: iteration 5020, 22 tensors bitwise the model's."
    assert place == f"Wrote {tmp_path / 'ckpt.pt'}"


@pytest.mark.nanogpt
@skip_without_nanogpt
def test_back_to_nanogpt_prints_the_command_that_goes_on_in_train_py(tmp_path):
    *_, command, _, _ = run_example(sys.executable, EXAMPLES_DIR / "back_to_nanogpt.py", tmp_path)
    _, folder, _, _, *arguments = shlex.split(command)  # cd FOLDER && python train.py FLAGS
    assert folder == NANOGPT_DIR
    run_example(sys.executable, *arguments, cwd=folder)
    state = read_checkpoint(tmp_path / "ckpt.pt").training_state
    assert state.iter_num == N_ITERATIONS + 40
    assert {int(moments["step"]) for moments in state.optimizer.moments.values()} == {40}


@needs_gloo
@pytest.mark.skipif(os.name != "posix", reason="the example is a shell script")
def test_finetune_fsdp_writes_one_whole_checkpoint(tmp_path):
    *_, claim, place = run_example("sh", EXAMPLES_DIR / "finetune_fsdp.sh", tmp_path)
    assert re.fullmatch(r"Split in 2: iteration 5010, loss \d\.\d{4} to \d\.\d{4}\.", claim)
    assert place == f"Wrote {tmp_path}/ckpt.pt"


@pytest.mark.parametrize(
    ("command", "claim", "written"),
    [
        ("sft.py", r"SFT: held-out loss \d\.\d{3} to \d\.\d{3} in 60 updates\.", "ckpt.pt"),
        ("dpo.py", r"DPO: held-out margin -?0\.000 to \d\.\d{3}, \d+% of pairs in order\.", "ckpt.pt"),
        ("reward.py", r"Reward: \d+% to \d+% of held-out pairs in order\.", "model.safetensors"),
        ("grpo.py", r"GRPO: mean reward \d+\.\d\d to \d+\.\d\d in 40 updates\.", "ckpt.pt"),
        ("grpo.py --trainer rloo", r"RLOO: mean reward \d+\.\d\d to \d+\.\d\d in 40 updates\.", "ckpt.pt"),
    ],
)
def test_trl_examples_make_good_their_claims(command, claim, written, tmp_path):
    pytest.importorskip("trl")
    script, *arguments = command.split()
    *_, last = run_example(sys.executable, EXAMPLES_DIR / script, tmp_path, *arguments)
    assert re.fullmatch(claim, last)
    assert (tmp_path / written).is_file()
    if written == "ckpt.pt":
        assert read_checkpoint(tmp_path / written).training_state.iter_num == N_ITERATIONS


def test_clients_md_names_commands_that_make_examples_runs():
    commands = re.findall(r"`python (examples/[^`]+)`", (ROOT / "docs" / "clients.md").read_text())
    makefile = (ROOT / "Makefile").read_text().splitlines()
    assert len(commands) >= 5
    assert not [
        command for command in commands if not any(line.endswith(f"/bin/python {command}") for line in makefile)
    ]


def test_a_claim_that_does_not_hold_ends_in_an_error(monkeypatch, capsys):
    pytest.importorskip("trl")
    monkeypatch.syspath_prepend(EXAMPLES_DIR)
    from trl_setup import conclude

    with pytest.raises(SystemExit, match="True"):
        conclude("Losses fall.", False)
    assert capsys.readouterr().out == "DOES NOT HOLD: Losses fall.\n"


def test_lora_ends_as_a_checkpoint_of_nanogpts(tmp_path):
    pytest.importorskip("peft")
    *_, place, claim = run_example(sys.executable, EXAMPLES_DIR / "lora.py", tmp_path)
    assert place == f"Wrote {tmp_path / 'ckpt.pt'}"
    assert re.fullmatch(r"Loss \d\.\d{4} to \d\.\d{4}; merged and back .*, logits differ by \de-0\d\.", claim)
    assert read_checkpoint(tmp_path / "ckpt.pt").training_state.iter_num == N_ITERATIONS


def test_quantize_costs_little(tmp_path):
    pytest.importorskip("torchao")
    *_, claim = run_example(sys.executable, EXAMPLES_DIR / "quantize.py", tmp_path)
    assert re.fullmatch(r"Perplexity 3\.\d{3} to 3\.\d{3}, 1\.41 MB to 0\.\d\d MB\.", claim)


def test_evaluate_agrees_with_our_own_numbers(tmp_path):
    pytest.importorskip("lm_eval")
    *_, claim = run_example(sys.executable, EXAMPLES_DIR / "evaluate.py", tmp_path)
    assert re.fullmatch(r"16 loglikelihoods within \de-0\d of our own, and 3 tasks run\.", claim)


@needs_gloo
@pytest.mark.skipif(os.name != "posix", reason="the example is a shell script")
@pytest.mark.skipif(not IS_RECENT, reason="older Transformers do not split a vocabulary of 65")
def test_tensor_parallel_splits_the_model_in_two():
    *_, claim = run_example("sh", EXAMPLES_DIR / "tensor_parallel.sh")
    assert re.fullmatch(r"Split in 2, 50% each: logits within \de-0\d of the largest, the same 200 tokens\.", claim)


def test_guide_runs_as_written(data_dir, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    assert len(blocks) == 5
    (tmp_path / "out").mkdir()
    shutil.copy(CKPT_PATH, tmp_path / "out" / "ckpt.pt")
    shutil.copytree(data_dir, tmp_path / "data" / "shakespeare_char")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks:
        exec(block, names)
    ends = {path.parent.name: read_checkpoint(path).training_state for path in tmp_path.glob("out-*/ckpt.pt")}
    moves = {"out-trainer": 20, "out-back": 20, "out-loop": 2}
    assert {folder: state.iter_num for folder, state in ends.items()} == {
        folder: N_ITERATIONS + n_updates for folder, n_updates in moves.items()
    }
    for state in ends.values():
        assert {int(moments["step"]) for moments in state.optimizer.moments.values()} == {state.iter_num}
    assert ends["out-back"].best_val_loss < read_checkpoint(CKPT_PATH).training_state.best_val_loss
    assert names["model"].config.loss_chunk_size == 1024


def read_table(header):
    """Reads the rows below a header of the guide; returns their cells without backticks."""
    table = GUIDE.split(header)[1].split("\n\n")[0].strip().splitlines()[1:]
    return [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in table]


def test_guide_lists_every_setting_of_train_py(tmp_path):
    config = {**read_checkpoint(CKPT_PATH).training_state.config, "out_dir": str(tmp_path)}
    args, left = training_arguments_from_nanogpt(config)
    mapped = read_table("| train.py | TrainingArguments | rule |\n")
    assert dict(read_table("| train.py | where it is |\n")) == left
    assert {theirs for theirs, _, _ in mapped} == config.keys() - left.keys()
    assert not [ours for _, ours, _ in mapped if not hasattr(args, ours)]
    same = {theirs: ours for theirs, ours, rule in mapped if not rule}
    assert len(same) == 11
    assert {theirs: getattr(args, ours) for theirs, ours in same.items()} == {
        theirs: config[theirs] for theirs in same
    }
