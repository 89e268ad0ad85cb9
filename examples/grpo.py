"""Trains a nanoGPT model by reinforcement with TRL's GRPOTrainer, and converts it back to nanoGPT.

The reward is the number of vowels in a line; any function of the completions works. RLOOTrainer takes the same
arguments, and a frozen reference, which TRL loads from the model's folder.

Run: python examples/grpo.py [out-example] [--trainer rloo] [--full], with pip install ".[trl]"
"""

from pathlib import Path

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl_setup import ARGUMENTS, SPEAKERS, conclude, load_tokenizer, parse_command

from hugging_nano_gpt import NanoGPTLMHeadModel
from hugging_nano_gpt.demo import CKPT_PATH


def count_vowels(completions: list[str], **kwargs) -> list[float]:
    """Returns the number of vowels in each completion."""
    return [float(sum(map(text.count, "aeiou"))) for text in completions]


TRAINERS = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}


def train(out_dir: Path, n_updates: int, trainer_name: str = "grpo") -> list[float]:
    """Trains and writes ckpt.pt into a folder; returns the mean reward of each update."""
    config_class, trainer_class = TRAINERS[trainer_name]

    start_dir = out_dir / "start"
    NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH).save_pretrained(start_dir)
    args = config_class(
        str(out_dir),
        max_completion_length=32,  # prompt and completion have to fit into block_size, 128
        max_steps=n_updates,
        num_generations=8,
        per_device_train_batch_size=64,
        learning_rate=1e-4,
        logging_steps=1,
        **ARGUMENTS,
    )
    data = Dataset.from_dict({"prompt": SPEAKERS * 8})
    trainer = trainer_class(str(start_dir), count_vowels, args, train_dataset=data, processing_class=load_tokenizer())
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]

    path = out_dir / "ckpt.pt"
    # other data than the run's, so no best loss yet
    trainer.model.to_nanogpt_ckpt(path, best_val_loss=1e9, overwrite=True)
    print(f"Wrote {path}")
    return rewards


if __name__ == "__main__":
    command = parse_command(__doc__, n_updates=40, trainers=tuple(TRAINERS))
    rewards = train(command.out_dir, command.n_updates, command.trainer)
    before, after = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    name = command.trainer.upper()
    conclude(f"{name}: mean reward {before:.2f} to {after:.2f} in {command.n_updates} updates.", after > 1.5 * before)
