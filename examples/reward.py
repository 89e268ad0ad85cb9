"""Trains a reward model from a nanoGPT checkpoint with TRL's RewardTrainer.

The score is a new linear layer, so Transformers reports that the checkpoint lacks `score.weight`. The model learns to
tell lines that the demo model is sure of from less sure ones.

Run: python examples/reward.py [out-example] [--full], with pip install ".[trl]"
"""

import torch
from trl import RewardConfig, RewardTrainer
from trl_setup import ARGUMENTS, conclude, load_tokenizer, parse_command, sample_pairs

from hugging_nano_gpt import NanoGPTForSequenceClassification
from hugging_nano_gpt.demo import CKPT_PATH

command = parse_command(__doc__, n_updates=60)

data = sample_pairs(640).train_test_split(test_size=128, seed=1337)
torch.manual_seed(1337)  # of the new layer
model = NanoGPTForSequenceClassification.from_nanogpt_ckpt(CKPT_PATH, num_labels=1)
args = RewardConfig(
    str(command.out_dir),
    max_length=model.config.block_size,  # TRL's default is 1024
    max_steps=command.n_updates,
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

model.save_pretrained(command.out_dir)
print(f"Wrote {command.out_dir}")
conclude(f"Reward: {before:.0%} to {after:.0%} of held-out pairs in order.", after > 0.8)
