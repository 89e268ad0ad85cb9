"""Continues a nanoGPT run in Transformers' Trainer, with its optimizer state, its schedule and its settings.

The run is the bundled demo checkpoint, which train.py stopped after 5,000 iterations on data/shakespeare_char. It
continues for 40 updates and writes one of Trainer's checkpoints, and a ckpt.pt that train.py resumes.

Run: python examples/resume_in_trainer.py [out-example]
"""

from dataclasses import replace
from pathlib import Path

from shakespeare_sample import choose_out_dir, write_data

from hugging_nano_gpt import NanoGPTLMHeadModel, read_checkpoint
from hugging_nano_gpt.demo import CKPT_PATH
from hugging_nano_gpt.training import (
    NanoGPTCheckpointCallback,
    NanoGPTTrainer,
    TokenDataset,
    training_arguments_from_nanogpt,
)


def main(out_dir: Path, n_updates: int = 40) -> None:
    """Trains, and writes both checkpoints into a folder."""
    data_dir = write_data(out_dir / "data")

    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
    state = read_checkpoint(CKPT_PATH).training_state  # iter_num, best_val_loss, settings, AdamW's moments

    # The run had decayed its learning rate completely. With 1,000 more iterations to decay, it can fall further.
    changes = {"lr_decay_iters": state.iter_num + 1000, "eval_interval": n_updates, "eval_iters": 10}
    config = {**state.config, **changes, "max_iters": state.iter_num + n_updates, "out_dir": str(out_dir)}
    args, _ = training_arguments_from_nanogpt(config, iter_num=state.iter_num, disable_tqdm=True)

    trainer = NanoGPTTrainer(
        model,
        args,
        TokenDataset(data_dir / "train.bin", model.config.block_size),
        TokenDataset(data_dir / "val.bin", model.config.block_size),
        # other data than the run's, so no best loss yet
        training_state=replace(state, config=config, best_val_loss=1e9),
    )
    trainer.add_callback(NanoGPTCheckpointCallback(trainer, out_dir / "ckpt.pt"))
    before = trainer.evaluate()["val/loss"]
    trainer.train()

    written = read_checkpoint(out_dir / "ckpt.pt").training_state
    steps = {int(moments["step"]) for moments in written.optimizer.moments.values()}
    assert written.best_val_loss < before
    assert written.iter_num == state.iter_num + n_updates
    assert steps == {written.iter_num}  # AdamW continued where train.py stopped
    assert (out_dir / f"checkpoint-{n_updates}" / "model.safetensors").is_file()  # Trainer's own checkpoint
    print(f"Continued to iteration {written.iter_num}, validation loss {before:.4f} to {written.best_val_loss:.4f}.")
    print(f"Wrote {out_dir / 'ckpt.pt'}")


if __name__ == "__main__":
    main(choose_out_dir())
