"""Fine-tunes a nanoGPT model with LoRA in plain transformers.Trainer, merges it, and converts it back to nanoGPT.

`target_modules="all-linear"` selects every projection of the blocks, but not the head, which is tied to the embedding.
Needs `pip install ".[train,peft]"`.

Run: python examples/lora.py [out-example]
"""

from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from shakespeare_sample import choose_out_dir, write_data
from transformers import Trainer, TrainingArguments

from hugging_nano_gpt import NanoGPTLMHeadModel
from hugging_nano_gpt.demo import CKPT_PATH


def main(out_dir: Path, n_updates: int = 20) -> None:
    """Trains, and writes the base, the adapter and the merged model into a folder."""
    data_dir = write_data(out_dir / "data")

    # Save the base as a folder, because the adapter stores the base's name.
    NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH).save_pretrained(out_dir / "base")
    base = NanoGPTLMHeadModel.from_pretrained(out_dir / "base")
    tokens = torch.from_numpy(np.fromfile(data_dir / "train.bin", dtype=np.uint16).astype(np.int64))
    rows = tokens.unfold(0, base.config.block_size, base.config.block_size)  # (rows, block_size)

    torch.manual_seed(1337)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=8))
    args = TrainingArguments(
        str(out_dir),
        max_steps=n_updates,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    trainer.train()
    model.save_pretrained(out_dir / "adapter")  # only the adapter

    adapted = PeftModel.from_pretrained(NanoGPTLMHeadModel.from_pretrained(out_dir / "base"), out_dir / "adapter")
    with torch.no_grad():
        expected = adapted(rows[:4]).logits
        before = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)(rows[:4], labels=rows[:4]).loss
        adapted.merge_and_unload().to_nanogpt_ckpt(out_dir / "ckpt.pt", overwrite=True)
        back = NanoGPTLMHeadModel.from_nanogpt_ckpt(out_dir / "ckpt.pt")(rows[:4], labels=rows[:4])
    torch.testing.assert_close(
        back.logits, expected, rtol=0, atol=1e-4
    )  # added before the product instead of after it
    assert back.loss < before
    print(f"Wrote {out_dir / 'ckpt.pt'}")
    difference = (back.logits - expected).abs().max()
    claim = f"merged and back from nanoGPT's format, logits differ by {difference:.0e}."
    print(f"Loss {before:.4f} to {back.loss:.4f}; {claim}")


if __name__ == "__main__":
    main(choose_out_dir())
