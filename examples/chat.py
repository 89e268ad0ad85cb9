"""Turns a base model into a chat model with TRL's SFTTrainer, ready to be served, and converts it back to nanoGPT.

The demo model learns the conversations of conversations.jsonl by heart: it says nothing wise, but it answers and
stops. docs/chat.md says what to change for a model with GPT-2's tokens and for your own conversations.

Run: python examples/chat.py [out-example] [--full], with pip install ".[trl]"
"""

import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer
from trl_setup import ARGUMENTS, conclude, parse_command

from hugging_nano_gpt import (
    CharacterTable,
    NanoGPTLMHeadModel,
    build_character_tokenizer,
    fit_vocabulary,
    read_meta,
    write_meta,
)
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH

CONVERSATIONS_PATH = Path(__file__).with_name("conversations.jsonl")

# A token for each role, one that ends a message, and one that is only padding.
USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}<|user|>{{ message.content }}<|end|>"
    "{% elif message.role == 'assistant' %}<|assistant|>"
    "{% generation %}{{ message.content }}<|end|>{% endgeneration %}"  # what assistant_only_loss trains on
    "{% else %}{{ raise_exception('expected the roles user and assistant, got ' + message.role) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# nanoGPT's meta.pkl can only contain single characters. The demo model has none of these.
STAND_INS = {USER: "<", ASSISTANT: ">", END: "|", PAD: "~"}


def add_chat(model: NanoGPTLMHeadModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives a model and its tokenizer the tokens, in rows to spare or in added ones, and the template."""
    n_tokens = len(tokenizer)
    tokenizer.add_special_tokens({"eos_token": END, "pad_token": PAD, "extra_special_tokens": [USER, ASSISTANT]})
    tokenizer.chat_template = TEMPLATE
    if len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():  # no text has trained these rows: each begins as the mean of those that are tokens
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[n_tokens : len(tokenizer)] = layer.weight[:n_tokens].mean(0)
    fit_vocabulary(model, tokenizer)


def read_conversations() -> list[list[dict[str, str]]]:
    """Reads the messages of each conversation."""
    return [json.loads(line)["messages"] for line in CONVERSATIONS_PATH.read_text(encoding="utf-8").splitlines()]


def train(model: NanoGPTLMHeadModel, tokenizer: PreTrainedTokenizerBase, out_dir: Path, n_updates: int) -> None:
    """Trains on the answers. Every update uses all conversations."""
    conversations = read_conversations()
    lengths = [len(tokenizer.apply_chat_template(messages)["input_ids"]) for messages in conversations]
    assert max(lengths) <= model.config.block_size  # TRL would cut off the ends, and the model would not learn to stop
    args = SFTConfig(
        str(out_dir),
        assistant_only_loss=True,
        max_length=model.config.block_size,
        max_steps=n_updates,
        per_device_train_batch_size=len(conversations),
        learning_rate=2e-3,
        **ARGUMENTS,
    )
    data = Dataset.from_list([{"messages": messages} for messages in conversations])
    SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer).train()


def answer(model: NanoGPTLMHeadModel, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """Returns the likeliest answer to a conversation, with its end if it has one."""
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    tokens = model.generate(**inputs, max_length=model.config.block_size, do_sample=False)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])


def write_for_nanogpt(model: NanoGPTLMHeadModel, tokenizer: PreTrainedTokenizerBase, out_dir: Path) -> None:
    """Writes out/ckpt.pt, and data/chat/meta.pkl, which sample.py needs to decode its text."""
    ids = tokenizer.get_vocab()
    characters = tuple(STAND_INS.get(token, token) for token in sorted(ids, key=ids.__getitem__))
    write_meta(CharacterTable(characters), out_dir / "data" / "chat" / "meta.pkl", overwrite=True)
    config = {**model.nanogpt_training_state.config, "dataset": "chat"}
    path = out_dir / "out" / "ckpt.pt"
    model.to_nanogpt_ckpt(path, config=config, best_val_loss=1e9, overwrite=True)  # no loss of these data yet


def main(out_dir: Path, n_updates: int) -> list[bool]:
    """Writes the folder chat and nanoGPT's files; returns for each answer whether it is the learned one."""
    tokenizer = build_character_tokenizer(read_meta(META_PATH), block_size=128)
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
    add_chat(model, tokenizer)
    train(model, tokenizer, out_dir, n_updates)

    folder = out_dir / "chat"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_for_nanogpt(model, tokenizer, out_dir)
    print(f"Wrote {folder}, for hugging-nano-gpt serve {folder}")
    print(f"Wrote {out_dir / 'out' / 'ckpt.pt'} and {out_dir / 'data' / 'chat' / 'meta.pkl'}, for nanoGPT")

    return [
        answer(model, tokenizer, messages[:index]) == message["content"] + END
        for messages in read_conversations()
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


if __name__ == "__main__":
    command = parse_command(__doc__, n_updates=60)
    results = main(command.out_dir, command.n_updates)
    claim = f"{sum(results)} of {len(results)} answers as learned, to the end, after {command.n_updates} updates."
    conclude(f"Chat: {claim}", all(results))
