"""The commands that go from a text to a saved folder, at the smallest size."""

from .programs import run_command

TRAIN = (
    "--dataset=mine --device=cpu --dtype=float32 --compile=False --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 "
    "--batch_size=2 --gradient_accumulation_steps=1 --max_iters=2 --eval_interval=2 --eval_iters=1 --dropout=0.0"
).split()


def run(*words):
    result = run_command(*words)
    assert result.returncode == 0, result.stderr
    return result.stdout


def make_folder(tokenizer):
    """Runs four of the five commands; returns what each prints."""
    return [
        run("prepare", "input.txt", "data/mine", "--tokenizer", tokenizer),
        run("train", *TRAIN),
        run("evaluate", "out/ckpt.pt", "data/mine"),
        run("convert", "out/ckpt.pt", "model"),
    ]
