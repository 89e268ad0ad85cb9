"""Looks inside a nanoGPT model with nnsight, and inside its export with TransformerLens.

nnsight loads the model directly. TransformerLens knows GPT-2, so it loads the export, which computes the same. Needs
`pip install ".[interpret]"`.

Run: python examples/interpret.py [out-example]
"""

import torch
from nnsight import TransformersModel
from shakespeare_sample import choose_out_dir
from transformer_lens.model_bridge import TransformerBridge

from hugging_nano_gpt import NanoGPTLMHeadModel, build_character_tokenizer, export_gpt2, read_meta
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH

TEXT, LAYER = "To be, or not to be", 1
# TransformerLens computes attention with separate weights for each head, so it adds float32 sums in another order.
ATOL = 1e-4

out_dir = choose_out_dir()
model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
tokenizer = build_character_tokenizer(read_meta(META_PATH))
idx = tokenizer(TEXT, return_tensors="pt").input_ids
with torch.no_grad():
    outputs = model(idx, output_hidden_states=True)

lens = TransformersModel(model, tokenizer=tokenizer, task="text-generation")
with torch.no_grad(), lens.trace(TEXT):
    hidden_states = lens.transformer.h[LAYER].output.save()  # (B, T, C)
    logits = lens.lm_head.output.save()
assert torch.equal(hidden_states, outputs.hidden_states[LAYER + 1])
assert torch.equal(logits, outputs.logits)
with torch.no_grad(), lens.trace(TEXT):
    lens.transformer.h[LAYER].mlp.output[:] = 0
    ablated = lens.lm_head.output.save()
change = (ablated - logits).abs().max()
assert change > 1
print(
    f"nnsight: the model's own numbers, bit for bit; without the MLP of layer {LAYER} logits change by {change:.2f}."
)

export_gpt2(model, out_dir / "gpt2", tokenizer=tokenizer, overwrite=True)
bridge = TransformerBridge.boot_transformers(str(out_dir / "gpt2"), device="cpu", dtype=torch.float32)
with torch.no_grad():
    logits, cache = bridge.run_with_cache(idx)
difference = (logits - outputs.logits).abs().max()
assert difference < ATOL
pattern = cache[f"blocks.{LAYER}.attn.hook_pattern"]
assert pattern.shape == (1, model.config.n_head, idx.shape[1], idx.shape[1])
torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:-1]))
print(f"TransformerLens: the export's logits differ by {difference:.1e}; patterns of {pattern.shape[1]} heads.")
