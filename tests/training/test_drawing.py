"""NanoGPTTrainer draws batches in train.py's order: its run from scratch has the bits of an independent run."""

import shutil
from dataclasses import replace

import pytest
import torch
from transformers import TrainerCallback

from hugging_nano_gpt import CheckpointError, NanoGPTConfig, NanoGPTLMHeadModel, TrainingState
from hugging_nano_gpt.training import (
    NanoGPTTrainer,
    TokenDataset,
    collate_windows,
    read_optimizer,
    training_arguments_from_nanogpt,
)

from ..helpers.reference_run import SHAPE, ReferenceRun
from ..helpers.toy_run import SETTINGS as TOY_SETTINGS
from ..helpers.trace import TRACE_DIR

VOCAB_SIZE = 65
SETTINGS = {**TOY_SETTINGS, "max_iters": 10, "lr_decay_iters": 8}


def make_trainer(folder, trainer_class=NanoGPTTrainer, n_updates=11, **arguments):
    """Makes a trainer whose first evaluation comes before its first update."""
    model = make_fresh_model()
    config = {**SETTINGS, "out_dir": str(folder)}
    quiet = {"disable_tqdm": True, "eval_on_start": True, "max_steps": n_updates, "save_strategy": "no"}
    args, _ = training_arguments_from_nanogpt(config, **{**quiet, **arguments})
    datasets = [TokenDataset(TRACE_DIR / f"{split}.bin", 16) for split in ("train", "val")]
    return trainer_class(model, args, *datasets, training_state=TrainingState(config=config))


def make_fresh_model():
    torch.manual_seed(1337)
    shape = {name: SETTINGS[name] for name in SHAPE}
    return NanoGPTLMHeadModel(NanoGPTConfig(vocab_size=VOCAB_SIZE, **shape)).train()


def is_same(trainer, run):
    """Returns whether a trainer and a run have the same weights and moments, bit for bit."""
    model = trainer.model
    expected = run.model.state_dict()
    if not all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items()):
        return False
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    moments = read_optimizer(trainer.optimizer, model).moments
    return all(
        torch.equal(moments[names[parameter]][key], value)
        for parameter, state in run.optimizer.state.items()
        for key, value in state.items()
    )


@pytest.fixture(scope="module")
def reference():
    return ReferenceRun(SETTINGS, TRACE_DIR, VOCAB_SIZE).run()


def test_run_from_scratch_ends_at_the_bits_of_train_pys_order(tmp_path, reference):
    torch.manual_seed(5)  # random numbers drawn before do not matter
    trainer = make_trainer(tmp_path)
    losses = []
    trainer.model.register_forward_hook(
        lambda model, _, out: losses.append(out.loss.item() if model.training else None)
    )
    trainer.train()
    assert [loss for loss in losses if loss is not None][1::2] == reference.losses  # the last micro-step's
    assert is_same(trainer, reference)
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry][:-1]  # Trainer adds one at the end
    assert [(entry["train/loss"], entry["val/loss"]) for entry in logged] == [
        (means["train"], means["val"]) for means in reference.evaluations
    ]


class OneBatchMore(NanoGPTTrainer):
    """Draws two batches before the first update."""

    def _begin_drawing(self):
        super()._begin_drawing()
        self._batches.draw()


class BatchesFirst(NanoGPTTrainer):
    """Reads and draws all batches of an update before its first forward pass, as Trainer does on its own."""

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches = []
        for _ in range(num_batches):
            batches.append(self._batches.take())
            self._batches.draw()
        return batches, None

    def compute_loss(self, model, *args, **kwargs):
        return super(NanoGPTTrainer, self).compute_loss(model, *args, **kwargs)


@pytest.mark.parametrize("broken", [OneBatchMore, BatchesFirst])
def test_batches_drawn_in_another_order_end_elsewhere(broken, tmp_path, reference):
    """Shows that the comparison can fail."""
    trainer = make_trainer(tmp_path, broken, n_updates=2)
    trainer.train()
    assert not is_same(trainer, ReferenceRun({**SETTINGS, "max_iters": 1}, TRACE_DIR, VOCAB_SIZE).run())


def test_reference_drawn_in_another_order_ends_elsewhere(reference):
    """Shows that the reference's own order matters."""
    for change in ({"n_first": 2}, {"is_late": True}):
        other = ReferenceRun({**SETTINGS, "max_iters": 1}, TRACE_DIR, VOCAB_SIZE, **change).run()
        assert other.losses != reference.losses[:2]


def test_run_resumed_from_trainers_checkpoint_ends_at_the_same_bits(tmp_path, reference):
    """With dropout, and saved after an evaluation; the next batch was drawn before both."""
    make_trainer(tmp_path, save_strategy="steps", save_steps=4, save_total_limit=None, n_updates=11).train()
    shutil.rmtree(tmp_path / "checkpoint-8")
    torch.manual_seed(5)
    trainer = make_trainer(tmp_path, eval_on_start=False)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert is_same(trainer, reference)


def test_checkpoint_that_a_process_did_not_finish_is_refused(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=2, n_updates=2).train()
    folder = tmp_path / "checkpoint-2"
    path = folder / "nanogpt_next_batch_0.json"
    path.write_text(path.read_text().replace('"world_size": 1', '"world_size": 2'))
    with pytest.raises(CheckpointError, match=r"checkpoint-2: not a whole .*no nanogpt_next_batch_1\.json"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(folder))
    (folder / "nanogpt_next_batch_1.json").write_text(path.read_text())
    with pytest.raises(CheckpointError, match=r"checkpoint-2: expected as many processes .*, 2, got 1; start as many"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(folder))
    path.unlink()
    with pytest.raises(CheckpointError, match=r"not a whole .*no nanogpt_next_batch_0\.json"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(folder))


def test_evaluation_outside_of_training_is_train_pys_first_and_draws_nothing(tmp_path, reference):
    trainer = make_trainer(tmp_path)
    before = torch.get_rng_state()
    for _ in range(2):
        metrics = trainer.evaluate()
        assert (metrics["train/loss"], metrics["val/loss"]) == tuple(reference.evaluations[0].values())
    assert torch.equal(torch.get_rng_state(), before)


class EvaluatesOthers(TrainerCallback):
    """Evaluates another data set, and the trainer's own under another name, after every update."""

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.evaluate(self.dataset)
        self.trainer.evaluate(metric_key_prefix="again")


def test_evaluation_of_another_data_set_in_training_changes_no_bit_and_no_best_val_loss(tmp_path, reference):
    trainer = make_trainer(tmp_path)
    others = EvaluatesOthers()
    others.trainer, others.dataset = trainer, TokenDataset(TRACE_DIR / "train.bin", 16)
    trainer.add_callback(others)
    trainer.train()
    assert is_same(trainer, reference)
    logged = [entry["val/loss"] for entry in trainer.state.log_history if "val/loss" in entry]
    assert logged[:-1] == [means["val"] for means in reference.evaluations]  # Trainer adds one at the end
    assert trainer.best_val_loss == logged[-1]


def test_evaluation_of_another_data_set_is_not_logged_as_val_loss(tmp_path):
    trainer = make_trainer(tmp_path)
    own = trainer.evaluate()
    other = trainer.evaluate(trainer.train_dataset)
    assert other.keys() == {"eval_loss"}
    again = trainer.evaluate(metric_key_prefix="again")
    assert again == {"again_loss": trainer.evaluate(trainer.eval_dataset, metric_key_prefix="last")["last_loss"]}
    losses = [{name: v for name, v in entry.items() if "loss" in name} for entry in trainer.state.log_history]
    assert losses[:3] == [own, other, again]
    assert trainer.best_val_loss == own["val/loss"]
    explicit = trainer.evaluate(trainer.eval_dataset)
    assert explicit == own


def test_predict_has_the_loss_of_every_window(tmp_path):
    trainer = make_trainer(tmp_path, per_device_train_batch_size=8, per_device_eval_batch_size=8)
    windows = torch.utils.data.Subset(trainer.eval_dataset, range(8))
    with torch.no_grad():
        expected = trainer.model.eval()(**collate_windows(list(windows)), use_cache=False).loss
    output = trainer.predict(windows)
    assert output.metrics["test_loss"] == pytest.approx(expected.item(), abs=1e-6)
    assert output.label_ids.shape == (8, 16)


@pytest.mark.parametrize("always_save", [True, False])
def test_best_val_loss_is_the_last_where_every_evaluation_saves(tmp_path, always_save):
    trainer = make_trainer(tmp_path)
    config = {**SETTINGS, "always_save_checkpoint": always_save}
    trainer.training_state = replace(trainer.training_state, best_val_loss=2.0, config=config)
    trainer.state.log_history = [{"val/loss": 1.0}, {"loss": 9.0}, {"val/loss": 3.0}]
    assert trainer.best_val_loss == (3.0 if always_save else 1.0)
