"""Fine-tunes a nanoGPT model with plain transformers.Trainer, and converts it back with its optimizer state.

Only the two conversions are special to nanoGPT: Trainer creates its own AdamW and its own schedule, and the data are
rows of input_ids and labels. If NANOGPT_DIR names a checkout, the command that continues in train.py is printed.

Run: python examples/back_to_nanogpt.py [out-example]
"""

import os
import shlex
from pathlib import Path

import numpy as np
import torch
from shakespeare_sample import choose_out_dir, write_data
from transformers import Trainer, TrainingArguments

from hugging_nano_gpt import NanoGPTLMHeadModel, read_checkpoint
from hugging_nano_gpt.demo import CKPT_PATH
from hugging_nano_gpt.training import read_optimizer


def main(out_dir: Path, n_updates: int = 20) -> None:
    """Trains, and writes ckpt.pt into a folder."""
    data_dir = write_data(out_dir / "data")

    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
    tokens = torch.from_numpy(np.fromfile(data_dir / "train.bin", dtype=np.uint16).astype(np.int64))
    rows = tokens.unfold(0, model.config.block_size, model.config.block_size)  # (rows, block_size)
    args = TrainingArguments(
        str(out_dir),
        max_steps=n_updates,
        per_device_train_batch_size=16,
        learning_rate=3e-4,
        weight_decay=0.1,
        adam_beta2=0.99,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    trainer.train()

    start = model.nanogpt_training_state
    iter_num = start.iter_num + trainer.state.global_step
    path = out_dir / "ckpt.pt"
    optimizer = read_optimizer(trainer.optimizer, model)  # by name: Trainer orders parameters differently
    # no loss of these data yet
    model.to_nanogpt_ckpt(path, optimizer=optimizer, iter_num=iter_num, best_val_loss=1e9, overwrite=True)

    written = read_checkpoint(path)
    assert all(torch.equal(written.state_dict[name], tensor) for name, tensor in model.state_dict().items())
    assert {int(moments["step"]) for moments in written.training_state.optimizer.moments.values()} == {n_updates}
    assert written.training_state.iter_num == iter_num

    if "NANOGPT_DIR" in os.environ:  # train.py takes only the model from the checkpoint, the rest from its flags
        changes = {"out_dir": out_dir, "init_from": "resume", "dataset": data_dir}
        changes |= {"max_iters": iter_num + n_updates, "eval_interval": n_updates}
        flags = [f"--{name}={value}" for name, value in {**start.config, **changes}.items()]
        print(f"cd {shlex.quote(os.environ['NANOGPT_DIR'])} && python train.py {shlex.join(flags)}")
    print(f"Back in nanoGPT's format: iteration {iter_num}, {len(written.state_dict)} tensors bitwise the model's.")
    print(f"Wrote {path}")


if __name__ == "__main__":
    main(choose_out_dir())
