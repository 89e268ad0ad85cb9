"""Loads one nanoGPT model into several processes, each with a part of every layer, and generates with all of them.

Transformers splits the model with the plan that the model defines; torchrun sets the number of processes.

Run: sh examples/tensor_parallel.sh
"""

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

from hugging_nano_gpt import NanoGPTLMHeadModel
from hugging_nano_gpt.demo import CKPT_PATH

whole = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH, distributed_config=DistributedConfig(tp_plan="auto"))
share = model.transformer.h[0].mlp.c_fc.weight.to_local().numel() / whole.transformer.h[0].mlp.c_fc.weight.numel()

expected = whole.generate(max_new_tokens=200, do_sample=False)  # (1, 201), past block_size
tokens = model.generate(max_new_tokens=200, do_sample=False)
assert torch.equal(tokens, expected)
ids = tokens[:, : whole.config.block_size]
with torch.no_grad():
    logits, expected = model(ids).logits, whole(ids).logits
difference = ((logits - expected).abs().max() / expected.abs().max()).item()  # sums are added in another order
assert difference < 1e-5
assert share == 1 / dist.get_world_size()
if dist.get_rank() == 0:
    shares = f"Split in {dist.get_world_size()}, {share:.0%} each"
    print(f"{shares}: logits within {difference:.0e} of the largest, the same 200 tokens.")
dist.destroy_process_group()
