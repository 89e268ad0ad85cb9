"""Trains a reward model from a nanoGPT checkpoint with TRL's RewardTrainer.

The score is a new linear layer, so Transformers reports that the checkpoint lacks `score.weight`. The model learns to
distinguish lines sampled at a low temperature from lines sampled at a higher one.

Run: python examples/reward.py [out-example] [--full], with pip install ".[trl]"
"""

from pathlib import Path

import torch
from trl import RewardConfig, RewardTrainer
from trl_setup import ARGUMENTS, conclude, load_tokenizer, parse_command, sample_pairs

from hugging_nano_gpt import NanoGPTForSequenceClassification
from hugging_nano_gpt.demo import CKPT_PATH


def train(out_dir: Path, n_updates: int, n_pairs: int = 640) -> tuple[float, float]:
    """Trains and writes the model into a folder; returns the share of pairs in order, before and after."""
    data = sample_pairs(n_pairs).train_test_split(test_size=0.2, seed=1337)
    torch.manual_seed(1337)  # initialises the new layer
    model = NanoGPTForSequenceClassification.from_nanogpt_ckpt(CKPT_PATH, num_labels=1)
    args = RewardConfig(
        str(out_dir),
        max_length=model.config.block_size,  # TRL's default is 1024
        max_steps=n_updates,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        **ARGUMENTS,
    )
    trainer = RewardTrainer(
        model, args, train_dataset=data["train"], eval_dataset=data["test"], processing_class=load_tokenizer()
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]

    model.save_pretrained(out_dir)
    print(f"Wrote {out_dir}")
    return before, after


if __name__ == "__main__":
    command = parse_command(__doc__, n_updates=60)
    before, after = train(command.out_dir, command.n_updates)
    conclude(f"Reward: {before:.0%} to {after:.0%} of held-out pairs in order.", after > 0.8)
