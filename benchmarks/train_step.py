"""Measures a training step (forward, backward, AdamW) at the size of nanoGPT's train_shakespeare_char.py.

Three models train side by side in one process: "ours" is NanoGPTLMHeadModel with nanoGPT's shifted targets,
"reference" is nanoGPT's architecture in plain torch, "gpt2" is transformers' GPT2LMHeadModel of the same size, whose
biases are always present. In each round, each model takes one step on the same batch with the same seed, in rotating
order, so that noise affects all of them. The ratios compared with the targets are medians of the ratios within each
round. Also printed are the ratios of the medians, and whether ours and the reference ended at the same loss.
The batch is 4, not 64, so that a step takes less than a second on two cores.

On a CPU it then measures the memory of the loss (loss_memory.py) and NanoGPTTrainer's overhead (trainer.py).

Run: python benchmarks/train_step.py [--repeats 30] [--size tiny] [--batch-size 4]
     [--device cuda] [--dtype bfloat16] [--compile]
The last line is one JSON object: medians, ratios, targets, versions and threads.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import Target, import_reference, print_result, print_table, synchronize
from loss_memory import LOSS_LIMITS, measure_loss_memory
from torch import nn
from trainer import MOST_OVERHEAD, measure_trainer
from transformers import GPT2Config, GPT2LMHeadModel

from hugging_nano_gpt import NanoGPTConfig, NanoGPTLMHeadModel

SIZES = {
    "shakespeare": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65},
    "tiny": {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 65},
}
DROPOUT = 0.2
WARM_UP_ROUNDS = 3
MOST_TIMES_SLOWER = 1.03

LossFunction = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Contender:
    """A model in training, the function that computes its loss, and what was measured.

    Args:
        compute_loss: Takes the model, idx (B, T) and the shifted targets (B, T).
        times_s: Seconds of each timed step.
        loss: Loss of the last step.
    """

    model: nn.Module
    compute_loss: LossFunction
    optimizer: torch.optim.Optimizer
    times_s: list[float]
    loss: float = float("nan")


def main() -> None:
    """Trains the three models in turn and prints the results."""
    args = parse_args()
    sizes = SIZES[args.size]
    contenders = make_contenders(sizes, args)
    for round_index in range(WARM_UP_ROUNDS + args.repeats):
        run_round(contenders, round_index, sizes, args)
    for contender in contenders.values():
        del contender.times_s[:WARM_UP_ROUNDS]
    is_cpu = args.device == "cpu" and not args.compile
    further = {**measure_loss_memory(), **measure_trainer(sizes)} if is_cpu else {}
    report(contenders, args, further)


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=30, help="timed steps of each model (default 30)")
    parser.add_argument("--size", choices=SIZES, default="shakespeare", help="tiny: a smoke test that takes seconds")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences a step (default 4)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or mps")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile each model")
    return parser.parse_args()


def make_contenders(sizes: dict[str, int], args: argparse.Namespace, dropout: float = DROPOUT) -> dict[str, Contender]:
    """Makes the three models; ours and the reference start with the same weights."""
    torch.manual_seed(1337)
    ours = NanoGPTLMHeadModel(NanoGPTConfig(**sizes, dropout=dropout, bias=False, attn_implementation="sdpa"))
    reference = import_reference()(**sizes, dropout=dropout, bias=False)
    reference.load_state_dict(ours.state_dict())
    ways: dict[str, tuple[nn.Module, LossFunction]] = {
        "ours": (ours, lambda model, idx, targets: model(idx, shift_labels=targets).loss),
        "reference": (reference, lambda model, idx, targets: model(idx, targets)[1]),
        "gpt2": (make_gpt2(sizes, dropout), lambda model, idx, targets: model(idx, labels=idx, use_cache=False).loss),
    }
    return {name: make_contender(model, compute_loss, args) for name, (model, compute_loss) in ways.items()}


def make_gpt2(sizes: dict[str, int], dropout: float) -> nn.Module:
    """Makes transformers' GPT-2 of the same size, with nanoGPT's activation and dropout."""
    config = GPT2Config(
        n_layer=sizes["n_layer"],
        n_head=sizes["n_head"],
        n_embd=sizes["n_embd"],
        n_positions=sizes["block_size"],
        vocab_size=sizes["vocab_size"],
        activation_function="gelu",
        attn_pdrop=dropout,
        embd_pdrop=dropout,
        resid_pdrop=dropout,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    return GPT2LMHeadModel(config)


def make_contender(model: nn.Module, compute_loss: LossFunction, args: argparse.Namespace) -> Contender:
    """Moves a model to the device in train mode, with its own AdamW with common settings."""
    model.to(args.device).train()
    fused = {"fused": True} if args.device.startswith("cuda") else {}  # as in nanoGPT
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), **fused)
    return Contender(torch.compile(model) if args.compile else model, compute_loss, optimizer, times_s=[])


def run_round(
    contenders: dict[str, Contender], round_index: int, sizes: dict[str, int], args: argparse.Namespace
) -> None:
    """Takes one step of each contender on the same batch; each round starts with another one."""
    torch.manual_seed(round_index)
    tokens = torch.randint(sizes["vocab_size"], (args.batch_size, sizes["block_size"] + 1)).to(args.device)
    idx, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()  # (B, T), as nanoGPT's get_batch
    order = list(contenders.values())
    first = round_index % len(order)
    for contender in order[first:] + order[:first]:
        torch.manual_seed(round_index)
        synchronize(args.device)
        start = time.perf_counter()
        loss = take_step(contender, idx, targets, args)
        synchronize(args.device)
        contender.times_s.append(time.perf_counter() - start)
        contender.loss = loss.item()


def take_step(
    contender: Contender, idx: torch.Tensor, targets: torch.Tensor, args: argparse.Namespace
) -> torch.Tensor:
    """Takes one training step: forward, backward, AdamW, zero_grad."""
    device_type = torch.device(args.device).type
    with torch.autocast(device_type, dtype=torch.bfloat16, enabled=args.dtype == "bfloat16"):
        loss = contender.compute_loss(contender.model, idx, targets)
    loss.backward()
    contender.optimizer.step()
    contender.optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def report(contenders: dict[str, Contender], args: argparse.Namespace, further: dict[str, Any]) -> None:
    """Prints the table, the targets and the JSON line."""
    tokens = args.batch_size * SIZES[args.size]["block_size"]
    medians = {name: statistics.median(contender.times_s) for name, contender in contenders.items()}
    print_table(
        ("", "median ms", "fastest ms", "tokens/s", "last loss"),
        [
            (name, 1e3 * medians[name], 1e3 * min(contender.times_s), round(tokens / medians[name]), contender.loss)
            for name, contender in contenders.items()
        ],
    )
    others = ("reference", "gpt2")
    ours = contenders["ours"].times_s
    ratios = {
        f"ours_to_{name}": statistics.median(t / u for t, u in zip(ours, contenders[name].times_s, strict=True))
        for name in others
    }
    figures = {
        "benchmark": "train_step",
        **vars(args),
        **{f"{name}_ms": round(1e3 * median, 3) for name, median in medians.items()},
        **{f"{name}_tokens_per_s": round(tokens / median) for name, median in medians.items()},
        **{f"ours_to_{name}_of_medians": round(medians["ours"] / medians[name], 4) for name in others},
        **{name: round(ratio, 4) for name, ratio in ratios.items()},
        "is_loss_equal_to_reference": contenders["ours"].loss == contenders["reference"].loss,
        **further,
    }
    is_tiny = args.size == "tiny"
    for name, figure in further.items():
        print(f"{name}: {figure}")
    targets = [] if is_tiny else [Target(name, ratio, MOST_TIMES_SLOWER) for name, ratio in ratios.items()]
    if further and not is_tiny:
        targets.append(Target("trainer_overhead", further["trainer_overhead"], MOST_OVERHEAD))
        targets += [Target(name, further[name], limit) for name, limit in LOSS_LIMITS.items()]
    print_result(figures, targets, args.device)


if __name__ == "__main__":
    main()
