"""plot_losses: the same losses from log.jsonl, train.py's printed lines and Trainer's state; and the picture."""

import json
import math

import pytest

from hugging_nano_gpt import CheckpointError, ConversionError, MissingDependencyError
from hugging_nano_gpt.training import plot_losses
from hugging_nano_gpt.training.plot import read_losses

from ..helpers.programs import run_command
from ..helpers.toy_run import train

PRINTED = """number of parameters: 10.65M
step 0: train loss 4.2874, val loss 4.2823
iter 0: loss 4.2654, time 28521.95ms, mfu -100.00%
iter 10: loss 3.1462, time 20.33ms, mfu 17.12%
step 20: train loss 2.5, val loss nan
saving checkpoint to out
step 10: train loss 2.7, val loss 2.8
iter 10: loss 3.0, time 20.11ms, mfu 17.2
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run, with its printed lines in log.txt."""
    folder = tmp_path_factory.mktemp("run")
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hugging_nano_gpt.training.run.tqdm.write", lines.append)
        train(folder, max_iters=8, report_to="none")
    (folder / "log.txt").write_text("\n".join(lines))
    return folder


def test_losses_of_log_jsonl_are_those_of_the_run(run):
    found = read_losses(run / "out")
    lines = [json.loads(line) for line in (run / "out" / "log.jsonl").read_text().splitlines()]
    assert found.updates == {entry["iter"]: entry["loss"] for entry in lines if "loss" in entry}
    assert found.val == {entry["iter"]: entry["val/loss"] for entry in lines if "val/loss" in entry}
    assert found.train == {entry["iter"]: entry["train/loss"] for entry in lines if "val/loss" in entry}
    assert (list(found.updates), list(found.val)) == (list(range(9)), [0, 4, 8])
    assert found == read_losses(run / "out" / "log.jsonl")


def test_losses_of_printed_lines_are_those_of_the_log_in_four_digits(run):
    for found, expected in zip(read_losses(run / "log.txt"), read_losses(run / "out"), strict=True):
        assert found == pytest.approx(expected, abs=5.001e-5)


def test_losses_of_trainer_state_are_those_of_the_log(run):
    found, expected = read_losses(run / "out" / "checkpoint-8" / "trainer_state.json"), read_losses(run / "out")
    assert (found.train, found.val) == (expected.train, expected.val)
    assert found.updates == {}  # the run has no loggers of Trainer's


def test_lines_of_train_py_that_are_made_again_replace_the_earlier_ones(tmp_path):
    (tmp_path / "log.txt").write_text(PRINTED)
    updates, train_losses, val = read_losses(tmp_path / "log.txt")
    assert list(updates.items()) == [(0, 4.2654), (10, 3.0)]
    assert list(train_losses.items()) == [(0, 4.2874), (10, 2.7), (20, 2.5)]
    assert list(val) == [0, 10, 20]
    assert math.isnan(val[20])


def test_history_of_plain_trainer_has_loss_and_eval_loss(tmp_path):
    history = [
        {"step": 5, "loss": 3.5, "learning_rate": 0.1},
        {"step": 5, "eval_loss": 3.4, "eval_runtime": 1.0},
        {"step": 6, "train_loss": 3.45, "train_runtime": 2.0},
    ]
    folder = tmp_path / "checkpoint-6"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}, indent=2))
    assert read_losses(tmp_path) == read_losses(folder) == ({5: 3.5}, {}, {5: 3.4})


def test_history_of_a_run_that_continued_has_nanogpts_iterations_and_its_own_losses(tmp_path):
    history = [
        {"step": 2, "train/loss": 1.5, "val/loss": 1.6, "eval_loss": 1.6, "iter": 102},
        {"step": 3, "eval_loss": 9.0, "iter": 103},  # of another data set
        {"step": 3, "loss": 1.4},
    ]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert read_losses(tmp_path) == ({103: 1.4}, {102: 1.5}, {102: 1.6})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"log_history": 3}', '{"log_history": []}', "Traceback:\n"])
def test_file_without_losses_is_refused(tmp_path, text):
    path = tmp_path / "log.txt"
    path.write_text(text)
    with pytest.raises(
        CheckpointError, match=r"log\.txt: no losses: expected lines of log\.jsonl .*; give the out_dir"
    ):
        read_losses(path)


def test_folder_without_losses_is_refused(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"no losses: expected log\.jsonl .*, got an empty folder; save train\.py"
    ):
        read_losses(tmp_path)
    (tmp_path / "ckpt.pt").touch()
    with pytest.raises(CheckpointError, match=r"or trainer_state\.json, got 'ckpt\.pt'; save train\.py's output"):
        read_losses(tmp_path)
    with pytest.raises(CheckpointError, match="missing: cannot be opened: No such file"):
        read_losses(tmp_path / "missing")


def test_plot_without_matplotlib_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("hugging_nano_gpt.errors.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"^plot: matplotlib is not installed; pip install matplotlib$"):
        plot_losses([tmp_path], tmp_path / "loss.png")


def test_picture_has_a_line_for_each_loss_of_each_run(run, tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    legends = []
    with pytest.MonkeyPatch.context() as patch:
        save = figure.Figure.savefig
        patch.setattr(
            figure.Figure,
            "savefig",
            lambda self, *args, **kwargs: (
                legends.append({line.get_label(): list(line.get_xdata()) for line in self.axes[0].get_lines()}),
                save(self, *args, **kwargs),
            ),
        )
        plot_losses([run / "out"], tmp_path / "one.png")
        plot_losses([run / "out", run / "log.txt"], tmp_path / "two.svg")
    each, evaluated = list(range(9)), [0, 4, 8]
    assert legends[0] == {"each iteration": each, "train loss": evaluated, "val loss": evaluated}
    assert legends[1] == {
        f"{name}: {label}": iterations
        for name in (run / "out", run / "log.txt")
        for label, iterations in legends[0].items()
    }
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "two.svg").read_text()


def test_command_plots_and_overwrites_nothing_without_force(run, tmp_path):
    pytest.importorskip("matplotlib")
    command = ("plot", run / "out", "--output", tmp_path / "loss.png")
    found = run_command(*command)
    assert (found.returncode, found.stdout, found.stderr) == (0, f"Wrote {tmp_path / 'loss.png'}\n", "")
    refused = run_command(*command)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "loss.png: is there already" in refused.stderr
    assert run_command(*command, "--force").returncode == 0


def test_picture_of_an_unknown_kind_is_refused(run, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(CheckpointError, match=r"loss\.txt: expected a suffix of .*png.*, got '\.txt'; give one"):
        plot_losses([run / "out"], tmp_path / "loss.txt")
    (tmp_path / "loss.png").touch()
    with pytest.raises(ConversionError, match="is there already"):
        plot_losses([run / "out"], tmp_path / "loss.png")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_losses_of_many_runs_that_are_not_finite_make_a_picture_without_a_warning(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "log.txt").write_text("step 0: train loss nan, val loss inf\niter 0: loss 2.5000, time 3.00ms\n")
    plot_losses([tmp_path / "log.txt"] * 12, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000
