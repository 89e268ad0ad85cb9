"""Evaluates a saved nanoGPT model with lm-evaluation-harness, offline, and computes every number again without it.

The three tasks in evaluate/ request a loglikelihood, a loglikelihood_rolling and a generate_until.
Needs `pip install ".[eval]"`.

Run, from the clone: python examples/evaluate.py [out-example]
"""

import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from shakespeare_sample import choose_out_dir

from hugging_nano_gpt import NanoGPTLMHeadModel, build_character_tokenizer, read_meta
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH

TASKS = ["demo_choice", "demo_text", "demo_generate"]

folder = choose_out_dir() / "demo"
model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
block_size = model.config.block_size
tokenizer = build_character_tokenizer(read_meta(META_PATH), block_size=block_size)
# lm-eval needs an end token and a padding token: here a character that the model hardly ever writes, because the
# newline would end every generation at the end of a line. The token before a text is the newline, as in sample.py.
tokenizer.eos_token = tokenizer.pad_token = "$"  # noqa: S105
model.save_pretrained(folder)
tokenizer.save_pretrained(folder)

results = simple_evaluate(
    model="hf",
    model_args={"pretrained": str(folder), "prefix_token_id": 0, "trust_remote_code": True},
    device="cpu",
    tasks=TASKS,
    task_manager=TaskManager(include_path="examples/evaluate", include_defaults=False),
    batch_size=4,
    bootstrap_iters=0,
)


def compute_loglikelihood(ids: list[int], n_scored: int) -> float:
    """Sums the log-probabilities of the last tokens, at most block_size tokens at a time."""
    total, begin = 0.0, len(ids) - n_scored
    while begin < len(ids):
        end = min(begin + block_size, len(ids))
        window = torch.tensor([ids[max(0, end - block_size - 1) : end]])  # (1, up to block_size + 1)
        with torch.no_grad():
            logprobs = model(window[:, :-1]).logits.log_softmax(-1).gather(-1, window[:, 1:, None])
        total += logprobs[0, begin - end :].sum().item()
        begin = end
    return total


found, expected = [], []
for sample in results["samples"]["demo_choice"]:
    context = sample["doc"]["context"]
    for choice, response in zip(sample["doc"]["choices"], sample["resps"], strict=True):
        moved = len(context) - len(context.rstrip())  # lm-eval counts white space at the context's end with the choice
        found.append(float(response[0][0]))
        expected.append(compute_loglikelihood(tokenizer(context + choice).input_ids, moved + len(choice)))
for sample in results["samples"]["demo_text"]:
    text = sample["doc"]["text"]
    found.append(float(torch.tensor(sample["resps"]).flatten()[0]))
    expected.append(compute_loglikelihood([0, *tokenizer(text).input_ids], len(text)))
for sample in results["samples"]["demo_generate"]:
    context = sample["doc"]["context"]
    tokens = model.generate(tokenizer(context, return_tensors="pt").input_ids, max_new_tokens=40, do_sample=False)
    assert sample["resps"][0][0] == tokenizer.decode(tokens[0])[len(context) :].split("\n\n")[0]

difference = max(abs(ours - theirs) for ours, theirs in zip(expected, found, strict=True))
assert difference < 1e-4
assert len(found) == 16
accuracy = results["results"]["demo_choice"]["acc,none"]
bits = results["results"]["demo_text"]["bits_per_byte,none"]
print(f"Accuracy {accuracy:.2f}, {bits:.3f} bits per byte.")
print("The same from the command line, in the clone:")
print(f"lm_eval run --model hf --device cpu --include_path examples/evaluate --tasks {','.join(TASKS)} \\")
print(f"    --model_args pretrained={folder},prefix_token_id=0,trust_remote_code=True")
print(f"{len(found)} loglikelihoods within {difference:.0e} of our own, and {len(TASKS)} tasks run.")
