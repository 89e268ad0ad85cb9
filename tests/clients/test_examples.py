"""The examples and the Python of docs/training.md and docs/trainer.md, run in this process and with few updates.

`make examples` runs each example in full, in a separate process; it fails if its claim is not true.
"""

import importlib
import re
import shlex
import shutil
import socket
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch

from hugging_nano_gpt import read_checkpoint
from hugging_nano_gpt.demo import CKPT_PATH
from hugging_nano_gpt.training import TokenDataset, read_settings, training_arguments_from_nanogpt

from ..helpers.folders import ROOT
from ..helpers.processes import needs_gloo
from ..helpers.scripts import NANOGPT_DIR, keep_settings, run_script, skip_without_nanogpt
from ..helpers.tiny import TORCH_VERSION

EXAMPLES_DIR = ROOT / "examples"
GUIDE = "\n".join((ROOT / "docs" / name).read_text() for name in ("training.md", "trainer.md"))
N_ITERATIONS = 5000  # of the demo checkpoint


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """The data that the examples train on."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(EXAMPLES_DIR)
        return importlib.import_module("shakespeare_sample").write_data(tmp_path_factory.mktemp("shakespeare_char"))


@pytest.fixture
def load_example(monkeypatch, data_dir):
    """Imports an example, with the modules in its folder; all examples share one set of data."""
    monkeypatch.syspath_prepend(EXAMPLES_DIR)

    def load(name):
        module = importlib.import_module(name)
        if hasattr(module, "write_data"):
            monkeypatch.setattr(module, "write_data", lambda folder: data_dir)
        return module

    return load


def test_sampled_data_are_in_the_format_of_prepare_py(data_dir):
    assert {path.name for path in data_dir.iterdir()} == {"train.bin", "val.bin", "meta.pkl"}
    for split in ("train", "val"):
        dataset = TokenDataset(data_dir / f"{split}.bin", 128)
        assert all(0 <= token < 65 for token in dataset[len(dataset) - 1]["shift_labels"].tolist())


def test_resume_in_trainer_goes_on_with_the_run(load_example, tmp_path, capsys):
    load_example("resume_in_trainer").main(tmp_path, n_updates=4)
    *_, claim, place = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"Continued to iteration 5004, validation loss \d\.\d{4} to \d\.\d{4}\.", claim)
    assert place == f"Wrote {tmp_path / 'ckpt.pt'}"


def test_back_to_nanogpt_ends_as_a_checkpoint_of_nanogpts(load_example, tmp_path, capsys):
    load_example("back_to_nanogpt").main(tmp_path, n_updates=2)
    *_, claim, place = capsys.readouterr().out.splitlines()
    assert claim == "Back in nanoGPT's format: iteration 5002, 22 tensors bitwise the model's."
    assert place == f"Wrote {tmp_path / 'ckpt.pt'}"


@pytest.mark.nanogpt
@skip_without_nanogpt
def test_back_to_nanogpt_prints_the_command_that_goes_on_in_train_py(load_example, tmp_path, capsys):
    load_example("back_to_nanogpt").main(tmp_path, n_updates=2)
    *_, command, _, _ = capsys.readouterr().out.splitlines()
    _, folder, _, python, script, *flags = shlex.split(command)  # cd FOLDER && python train.py FLAGS
    assert (folder, python, script) == (NANOGPT_DIR, "python", "train.py")
    run_script(Path(folder), script, *flags, "--eval_iters=1")
    state = read_checkpoint(tmp_path / "ckpt.pt").training_state
    assert state.iter_num == N_ITERATIONS + 4
    assert {int(moments["step"]) for moments in state.optimizer.moments.values()} == {4}


@pytest.mark.nanogpt
@skip_without_nanogpt
def test_sample_in_train_writes_samples_and_changes_no_bit(load_example, tmp_path, capsys, monkeypatch):
    example = load_example("sample_in_train")
    few = ["--max_iters=2", "--eval_interval=1", "--eval_iters=1"]
    monkeypatch.setattr(example, "FLAGS", [*example.FLAGS, *few])
    with warnings.catch_warnings(), keep_settings(), mock.patch.multiple(sys, argv=[], path=[*sys.path]):
        warnings.simplefilter("ignore")  # names that torch has deprecated since
        example.main(tmp_path)
    claim = capsys.readouterr().out.splitlines()[-1]
    assert claim == "Three samples, and the bits of iteration 2 as without them."


def test_pretrain_sh_gives_flags_that_train_knows():
    script = (EXAMPLES_DIR / "pretrain.sh").read_text()
    flags = re.search(r"hugging_nano_gpt train (.*?)\"\$@", script, flags=re.DOTALL).group(1)
    settings = read_settings(shlex.split(flags.replace("\\\n", "")))
    assert (settings["device"], settings["max_iters"]) == ("cpu", 40)


@needs_gloo
@pytest.mark.skipif(TORCH_VERSION < (2, 7), reason="FSDP2 of torch 2.6 does not run on a CPU")
def test_finetune_fsdp_writes_one_whole_checkpoint(load_example, data_dir, tmp_path, monkeypatch, capsys):
    """In one process, as torchrun starts it; tests/training/test_distributed.py splits a model over two."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1}
    for name, value in {**place, "GLOO_SOCKET_IFNAME": loopback}.items():
        monkeypatch.setenv(name, str(value))
    load_example("finetune_fsdp").main(data_dir, tmp_path / "ckpt.pt")
    claim = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"Split in 1: iteration 5010, loss \d\.\d{4} to \d\.\d{4}\.", claim)


# TRL 1.16 uses names that Transformers 5.23 has renamed, with any model.
ignore_trl = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")


@ignore_trl
def test_sft_lowers_the_loss(load_example, tmp_path):
    pytest.importorskip("trl")
    before, after = load_example("sft").train(tmp_path, n_updates=3)
    assert after < before
    assert read_checkpoint(tmp_path / "ckpt.pt").training_state.iter_num == N_ITERATIONS


@ignore_trl
def test_dpo_widens_the_margin(load_example, tmp_path):
    pytest.importorskip("trl")
    before, after = (
        figures["eval_rewards/margins"] for figures in load_example("dpo").train(tmp_path, n_updates=3, n_pairs=80)
    )
    assert abs(before) < 1e-3 < after
    assert read_checkpoint(tmp_path / "ckpt.pt").training_state.iter_num == N_ITERATIONS


@ignore_trl
def test_reward_puts_more_pairs_in_order(load_example, tmp_path):
    pytest.importorskip("trl")
    before, after = load_example("reward").train(tmp_path, n_updates=6, n_pairs=160)
    assert after > before
    assert (tmp_path / "model.safetensors").is_file()


@ignore_trl
@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_grpo_counts_vowels(load_example, tmp_path, name):
    """The rewards only grow after 40 updates, in make examples."""
    pytest.importorskip("trl")
    rewards = load_example("grpo").train(tmp_path, n_updates=2, trainer_name=name)
    assert len(rewards) == 2
    assert all(5 < reward < 15 for reward in rewards)
    assert read_checkpoint(tmp_path / "ckpt.pt").training_state.iter_num == N_ITERATIONS


def test_clients_md_names_commands_that_make_examples_runs():
    commands = re.findall(r"`python (examples/[^`]+)`", (ROOT / "docs" / "clients.md").read_text())
    makefile = (ROOT / "Makefile").read_text().splitlines()
    assert len(commands) >= 5
    assert not [
        command for command in commands if not any(line.endswith(f"/bin/python {command}") for line in makefile)
    ]


def test_a_claim_that_does_not_hold_ends_in_an_error(load_example, capsys):
    pytest.importorskip("trl")
    with pytest.raises(SystemExit, match="True"):
        load_example("trl_setup").conclude("Losses fall.", False)
    assert capsys.readouterr().out == "NOT TRUE: Losses fall.\n"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT
def test_lora_ends_as_a_checkpoint_of_nanogpts(load_example, tmp_path, capsys):
    pytest.importorskip("peft")
    load_example("lora").main(tmp_path, n_updates=4)
    *_, place, claim = capsys.readouterr().out.splitlines()
    assert place == f"Wrote {tmp_path / 'ckpt.pt'}"
    assert re.fullmatch(r"Loss \d\.\d{4} to \d\.\d{4}; merged and back .*, logits differ by \de-0\d\.", claim)
    assert read_checkpoint(tmp_path / "ckpt.pt").training_state.iter_num == N_ITERATIONS


def test_guide_runs_as_written(data_dir, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    assert len(blocks) == 5
    (tmp_path / "out").mkdir()
    contents = torch.load(CKPT_PATH, weights_only=True)
    contents["config"] |= {"batch_size": 8, "eval_iters": 5}  # instead of 32 and 20, which take seconds
    torch.save(contents, tmp_path / "out" / "ckpt.pt")
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
