"""One process of test_tensor_parallel.py: loads saved models split over both processes, and saves the results.

processes.py calls main in each of two processes. Each CASE is a folder in FOLDER with a saved model; computed-RANK.pt
in it has the results of process RANK, and ckpt.pt and saved/ are written by both together.
"""

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

from hugging_nano_gpt import NanoGPTLMHeadModel

from .tiny import make_batch

# Long enough for a busy machine, short enough that a process whose peer has died ends before the tests.
TIMEOUT_S = 60

PLANS = {"whole wte": {"transformer.wte": "replicate"}}  # a plan that replicates the embedding


def compute(model: NanoGPTLMHeadModel) -> dict[str, torch.Tensor]:
    """Computes logits, tokens past block_size, losses and full gradients, to compare with one process."""
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
    if case in PLANS:  # only its logits can be computed
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
