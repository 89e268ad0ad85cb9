"""Trains a nanoGPT model on preferences with TRL's DPOTrainer, and converts it back to nanoGPT.

TRL loads the model and its frozen reference from a folder, so the checkpoint is saved as one first. The chosen lines
are sampled at a low temperature, the rejected ones at a higher temperature.

Run: python examples/dpo.py [out-example] [--full], with pip install ".[trl]"
"""

from pathlib import Path

from trl import DPOConfig, DPOTrainer
from trl_setup import ARGUMENTS, conclude, load_tokenizer, parse_command, sample_pairs

from hugging_nano_gpt import NanoGPTLMHeadModel
from hugging_nano_gpt.demo import CKPT_PATH


def train(out_dir: Path, n_updates: int, n_pairs: int = 320) -> tuple[dict[str, float], dict[str, float]]:
    """Trains and writes ckpt.pt into a folder; returns the held-out metrics before and after."""
    data = sample_pairs(n_pairs).train_test_split(test_size=0.2, seed=1337)
    start_dir = out_dir / "start"
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
    model.save_pretrained(start_dir)

    args = DPOConfig(
        str(out_dir),
        max_length=model.config.block_size,  # TRL's default is 1024
        max_steps=n_updates,
        per_device_train_batch_size=16,
        learning_rate=1e-4,
        **ARGUMENTS,
    )
    trainer = DPOTrainer(
        str(start_dir),
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=load_tokenizer(),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()

    path = out_dir / "ckpt.pt"
    # other data than the run's, so no best loss yet
    trainer.model.to_nanogpt_ckpt(path, best_val_loss=1e9, overwrite=True)
    print(f"Wrote {path}")
    return before, after


if __name__ == "__main__":
    command = parse_command(__doc__, n_updates=40)
    before, after = train(command.out_dir, command.n_updates)
    margins = [figures["eval_rewards/margins"] for figures in (before, after)]
    share = after["eval_rewards/accuracies"]
    conclude(
        f"DPO: held-out margin {margins[0]:.3f} to {margins[1]:.3f}, {share:.0%} of pairs in order.",
        abs(margins[0]) < 1e-3 and margins[1] > 1.0 and share > 0.8,
    )
