"""One process of test_tensor_parallel.py: loads saved models split over all processes, and saves what they compute.

processes.py calls main in each of two. Each CASE is a folder in FOLDER with a saved model; computed-RANK.pt in
it is what process RANK computed, ckpt.pt and saved/ are what all of them wrote.
"""

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

from hugging_nano_gpt import NanoGPTLMHeadModel

from .tiny import make_batch

# Long enough for a busy machine, short enough that a process without peers does not outlive the tests.
TIMEOUT_S = 60

PLANS = {"whole wte": {"transformer.wte": "replicate"}}  # what the package's plan was once


def compute(model: NanoGPTLMHeadModel) -> dict[str, torch.Tensor]:
    """Computes what the processes are compared by: logits, tokens past block_size, losses, and gradients, whole."""
    idx, targets = make_batch(2, 20, vocab_size=64)
    with torch.no_grad():
        computed = {"logits": model(idx).logits}
    computed["tokens"] = model.generate(idx[:, :8], max_new_tokens=40, do_sample=False)
    model.train()(idx, shift_labels=targets).loss.backward()
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        computed[f"{name} grad"] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    model.config.loss_chunk_size = 7
    computed["loss in chunks"] = model(idx, shift_labels=targets).loss.detach()
    model.config.loss_chunk_size = None
    return computed


def run_case(folder: Path, case: str) -> None:
    """Loads a case, computes and saves."""
    plan = DistributedConfig(tp_plan=PLANS.get(case, "auto"))
    model = NanoGPTLMHeadModel.from_pretrained(folder / case / "model", distributed_config=plan)
    if case in PLANS:  # its logits alone can be computed
        with torch.no_grad():
            computed = {"logits": model(make_batch(2, 20, vocab_size=64)[0]).logits}
    else:
        computed = compute(model)
        model.save_pretrained(folder / case / "saved")
        if model.config.tie_word_embeddings:
            model.to_nanogpt_ckpt(folder / case / "ckpt.pt")
    torch.save(computed, folder / case / f"computed-{dist.get_rank()}.pt")


def main(folder: str, *cases: str) -> None:
    """Runs the cases one after another."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    for case in cases:
        run_case(Path(folder), case)
    dist.barrier()
    dist.destroy_process_group()
