"""Quantises a nanoGPT model to 8 bits with torchao, on the CPU, and measures the change in perplexity and size.

The token embedding, and the head that is tied to it, stay float. Needs `pip install ".[quantize]"`.

Run: python examples/quantize.py [out-example]
"""

import numpy as np
import torch
from shakespeare_sample import choose_out_dir, write_data
from torchao.quantization import Int8WeightOnlyConfig
from transformers import TorchAoConfig

from hugging_nano_gpt import ConversionError, NanoGPTLMHeadModel
from hugging_nano_gpt.demo import CKPT_PATH

out_dir = choose_out_dir()
tokens = np.fromfile(write_data(out_dir / "data") / "val.bin", dtype=np.uint16).astype(np.int64)
model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
rows = torch.from_numpy(tokens).unfold(0, model.config.block_size, model.config.block_size)  # (rows, block_size)

settings = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH, **settings).save_pretrained(out_dir / "int8")
quantized = NanoGPTLMHeadModel.from_pretrained(out_dir / "int8")
assert quantized.lm_head.weight is quantized.transformer.wte.weight
with torch.no_grad():
    before, after = (m(rows, labels=rows).loss.exp().item() for m in (model, quantized))
assert quantized.generate(max_new_tokens=200, do_sample=True).shape == (1, 201)
try:
    quantized.to_nanogpt_ckpt(out_dir / "ckpt.pt")
except ConversionError as error:
    print(error)  # a checkpoint has no place for it
files = [path / "model.safetensors" for path in (out_dir / "float", out_dir / "int8")]
model.save_pretrained(files[0].parent)
sizes = [file.stat().st_size / 1e6 for file in files]
assert after < before * 1.005
assert sizes[1] < sizes[0] / 3
print(f"Perplexity {before:.3f} to {after:.3f}, {sizes[0]:.2f} MB to {sizes[1]:.2f} MB.")
