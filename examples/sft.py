"""Fine-tunes a nanoGPT model with TRL's SFTTrainer, and converts it back to nanoGPT.

The demo model was trained on Shakespeare; here it learns to write in capitals. Any dataset for SFTTrainer works.

Run: python examples/sft.py [out-example] [--full], with pip install ".[trl]"
"""

from pathlib import Path

from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from trl_setup import ARGUMENTS, SPEAKERS, conclude, load_tokenizer, parse_command, sample_lines

from hugging_nano_gpt import NanoGPTLMHeadModel
from hugging_nano_gpt.demo import CKPT_PATH


def train(out_dir: Path, n_updates: int) -> tuple[float, float]:
    """Trains and writes ckpt.pt into a folder; returns the held-out loss before and after."""
    prompts = SPEAKERS * 64
    texts = [
        prompt + line.upper() for prompt, line in zip(prompts, sample_lines(prompts, temperature=0.8), strict=True)
    ]
    data = Dataset.from_dict({"text": texts}).train_test_split(test_size=64, seed=1337)

    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
    args = SFTConfig(
        str(out_dir),
        max_length=model.config.block_size,  # TRL's default is 1024
        max_steps=n_updates,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        **ARGUMENTS,
    )
    trainer = SFTTrainer(
        model, args, train_dataset=data["train"], eval_dataset=data["test"], processing_class=load_tokenizer()
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]

    path = out_dir / "ckpt.pt"
    # other data than the run's, so no best loss yet
    model.to_nanogpt_ckpt(path, best_val_loss=1e9, overwrite=True)
    print(f"Wrote {path}")
    return before, after


if __name__ == "__main__":
    command = parse_command(__doc__, n_updates=60)
    before, after = train(command.out_dir, command.n_updates)
    conclude(f"SFT: held-out loss {before:.3f} to {after:.3f} in {command.n_updates} updates.", after < before - 0.5)
