"""TRL's trainers compute the same numbers for a batch as for each row alone. The examples show that they learn."""

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from hugging_nano_gpt import (
    NanoGPTForSequenceClassification,
    NanoGPTLMHeadModel,
)
from hugging_nano_gpt.demo import CKPT_PATH, GOLDEN_PATH

from ..helpers.tiny import make_model, make_tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

# TRL 1.16 uses names that Transformers 5.23 has renamed, with any model.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")

TEXTS = ["ROMEO:\nO, speak!", "JULIET:\nAy me, what a thing it is to be a lord", "Nay.\n\nThen I will", "I"]
PAIRS = {
    "prompt": ["ROMEO:\n", "JULIET:\n"] * 2,
    "chosen": ["I love thee well.", "O, speak", "And so do I, my lord, and so do I", "Peace!"],
    "rejected": ["zzz", "qxqx\nqxqx", "Kvvv vvv vvv vvv vvvv vvvv vvvv", "Vk"],
}


@pytest.fixture
def tokenizer():
    return make_tokenizer(eos_token="\n", pad_token="\n")


@pytest.fixture
def common(tmp_path):
    """The arguments of every trainer here."""
    return {
        "output_dir": str(tmp_path / "out"),
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "max_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
    }


def make_online(name, model, tokenizer, common, reward=lambda completions, **kwargs: [0.0] * len(completions), **args):
    """Makes a GRPOTrainer or RLOOTrainer for a model in memory."""
    config = getattr(trl, f"{name}Config")(**common, **args, beta=0.0, num_generations=8)
    data = datasets.Dataset.from_dict({"prompt": TEXTS})
    return getattr(trl, f"{name}Trainer")(model, reward, config, train_dataset=data, processing_class=tokenizer)


def convert_to_gpt2(model):
    """Makes the GPT2LMHeadModel of the usual conversion: the same function, with zeros for the biases."""
    ours = model.config
    config = GPT2Config(
        vocab_size=ours.vocab_size,
        n_positions=ours.block_size,
        n_embd=ours.n_embd,
        n_layer=ours.n_layer,
        n_head=ours.n_head,
        activation_function="gelu",
    )
    gpt2 = GPT2LMHeadModel(config).eval()
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # transposed in Conv1D
    tensors = {name: tensor.T if name.endswith(linear) else tensor for name, tensor in model.state_dict().items()}
    loaded = gpt2.load_state_dict(tensors, strict=False)
    assert not loaded.unexpected_keys
    assert all(name.endswith(".bias") for name in loaded.missing_keys)
    return gpt2


@pytest.mark.parametrize("name", ["SFT", "DPO", "Reward", "GRPO", "RLOO"])
def test_trainer_of_a_saved_folder_warns_of_nothing(name, tokenizer, common, tmp_path, caplog):
    """With the defaults, RLOO and DPO load a reference model from the folder, DPO and Reward turn dropout off."""
    folder = str(tmp_path / "start")
    NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH, eos_token_id=0, pad_token_id=0).save_pretrained(folder)
    limit = {"max_completion_length" if name in ("GRPO", "RLOO") else "max_length": 64}
    args = getattr(trl, f"{name}Config")(**common, **limit)
    columns = {"SFT": {"text": TEXTS}, "DPO": PAIRS, "Reward": PAIRS}.get(name, {"prompt": TEXTS * 2})
    data = datasets.Dataset.from_dict(columns)
    rewards = {"reward_funcs": lambda completions, **kwargs: [float(len(text)) for text in completions]}
    more = rewards if name in ("GRPO", "RLOO") else {}
    trainer = getattr(trl, f"{name}Trainer")(folder, args=args, train_dataset=data, processing_class=tokenizer, **more)
    trainer.train()
    assert trainer.state.global_step == 1
    assert math.isfinite(trainer.state.log_history[0]["loss"])
    # Transformers reports the new score layer, as it does for GPT2ForSequenceClassification. Older releases (5.17)
    # also report that the model has a bos token and the character tokenizer has none.
    messages = [entry.message for entry in caplog.records]
    assert [text for text in messages if "{'bos_token_id': None}" not in text] == [
        text for text in messages if "score.weight | MISSING" in text
    ]
    assert sum("score.weight | MISSING" in text for text in messages) == (name == "Reward")


@torch.no_grad()
def score_alone(model, tokens, n_kept):
    """Returns the log-probabilities of a row's last tokens, without padding and without TRL."""
    log_probs = model(tokens[None, :-1]).logits[0].log_softmax(-1)
    return log_probs.gather(-1, tokens[1:, None])[-n_kept:, 0]


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_log_probs_of_left_padded_rows_are_those_of_the_rows_alone(name, tokenizer, common):
    """GPT2LMHeadModel counts the padding in its positions: https://github.com/huggingface/trl/issues/6800."""
    ours = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
    gpt2 = convert_to_gpt2(ours)
    text = load_file(GOLDEN_PATH)["idx"].flatten()[:128]
    lengths, n_kept = [28 + 6 * row for row in range(16)], 24
    ids, mask = torch.zeros(16, max(lengths), dtype=torch.long), torch.zeros(16, max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, -length:], mask[row, -length:] = text[row // 2 :][:length], 1
    alone = torch.stack([score_alone(ours, ids[row, -length:], n_kept) for row, length in enumerate(lengths)])
    gpt2_alone = torch.stack([score_alone(gpt2, ids[row, -length:], n_kept) for row, length in enumerate(lengths)])
    assert (gpt2_alone - alone).abs().max() < 1e-4  # the same function without padding

    differences = {}
    for model in (ours, gpt2):
        trainer = make_online(name, model, tokenizer, common)
        with torch.no_grad():
            log_probs, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, n_kept)
        differences[type(model)] = (log_probs - alone).abs().max().item()
    assert differences[NanoGPTLMHeadModel] < 1e-5
    assert differences[GPT2LMHeadModel] > 1e-2


@pytest.mark.parametrize("packing", [False, True])
def test_sft_loss_is_that_of_the_texts_alone_also_packed(packing, tokenizer, common):
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
    rows = [tokenizer(text + "\n", return_tensors="pt").input_ids[0] for text in TEXTS]
    log_probs = torch.cat([score_alone(model, row, len(row) - 1) for row in rows])
    args = trl.SFTConfig(**common, max_length=128, packing=packing)
    data = datasets.Dataset.from_dict({"text": TEXTS})
    trainer = trl.SFTTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(-log_probs.mean().item(), abs=1e-5)


def test_dpo_starts_at_its_reference_although_the_model_has_dropout(tokenizer, common, tmp_path):
    NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH, dropout=0.2).save_pretrained(tmp_path / "start")
    args = trl.DPOConfig(**common, max_length=128)
    data = datasets.Dataset.from_dict(PAIRS)
    trainer = trl.DPOTrainer(str(tmp_path / "start"), args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert isinstance(trainer.ref_model, NanoGPTLMHeadModel)


def test_rewards_are_those_of_the_texts_alone_with_a_padding_that_is_a_character(tokenizer, common):
    torch.manual_seed(1337)
    model = NanoGPTForSequenceClassification.from_nanogpt_ckpt(CKPT_PATH, num_labels=1)
    args = trl.RewardConfig(**common, max_length=128)
    data = datasets.Dataset.from_dict(PAIRS)
    trainer = trl.RewardTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    margin = trainer.evaluate()["eval_margin"]

    def score(prompt, text):  # with the newline at the end, which is eos and pad
        return model(tokenizer(f"{prompt}{text}\n", return_tensors="pt").input_ids, attention_mask=None).logits.item()

    model.config.pad_token_id = None  # a single text has no padding
    margins = [score(prompt, good) - score(prompt, bad) for prompt, good, bad in zip(*PAIRS.values(), strict=True)]
    assert margin == pytest.approx(sum(margins) / len(margins), abs=1e-5)


def test_grpo_never_generates_a_spare_row_of_the_vocabulary(tokenizer, common):
    model = make_model(vocab_size=80, block_size=64)
    model.generation_config.suppress_tokens = [*range(65, 80)]
    generated = set()

    def reward(completions, completion_ids, **kwargs):
        generated.update(token for row in completion_ids for token in row)
        return [float(len(text)) for text in completions]

    args = {"max_completion_length": 16, "per_device_train_batch_size": 32}
    make_online("GRPO", model, tokenizer, common, reward, **args).train()
    assert len(generated) > 20
    assert max(generated) < 65


def test_grpo_past_block_size_is_refused_with_the_length(tokenizer, common):
    model = make_model(block_size=64)
    args = {"max_completion_length": 200, "generation_kwargs": {"min_new_tokens": 100}}
    with pytest.raises(ValueError, match="expected at most block_size=64 tokens, got"):
        make_online("GRPO", model, tokenizer, common, **args).train()
