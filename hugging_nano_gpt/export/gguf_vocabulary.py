"""A tokenizer as the part of a GGUF file from which llama.cpp makes its own.

Byte-level BPE is llama.cpp's "gpt2". A character table is its "rwkv", which always takes the longest token that fits.
"gpt2" and "llama" cannot be used for characters: where the file names no end of text, they use token 11 or 2 for it,
and the model could never write that character. "rwkv" can hang on bytes that no token has (_find_traps); rows of the
model that no token uses can prevent that.

Source: llama.cpp's src/llama-vocab.cpp, as in llama-cpp-python 0.3.36.
"""

import json
import re
from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from ..errors import TokenizerError, list_some

if TYPE_CHECKING:
    import gguf

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # gguf.TokenType's

# The token that "gpt2" uses as the end of text where none is named.
_GPT2_EOS = 11

# How llama.cpp formats a chat where the file has no template.
_CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"

# How GPT-2 splits text before it merges: as tiktoken writes it (bpe.py writes \z for its $), as older releases of
# tiktoken do, and as Transformers does.
_GPT2_PATTERNS = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++\z|\s+(?!\S)|\s",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
)


def add_vocabulary(
    writer: "gguf.GGUFWriter", tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, suppressed: Collection[int]
) -> list[str]:
    """Adds a tokenizer to a GGUF file that is about to be written.

    Args:
        writer: Writer of the file.
        tokenizer: The tokenizer, of at most vocab_size tokens, or None for a file of token ids only.
        vocab_size: Number of rows of the model. llama.cpp wants a token for each: ids without one get an unused one.
        suppressed: Ids that generate never samples, in addition to those without a token.

    Returns:
        What llama.cpp does differently, one sentence each.

    Raises:
        TokenizerError: If llama.cpp has no equivalent of the tokenizer.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return ["no tokenizer: llama.cpp takes and gives token ids only"]
    where = tokenizer.name_or_path or "tokenizer"
    parts = _read_parts(where, tokenizer)
    merges = [" ".join(merge) for merge in parts["model"]["merges"]]
    tokens, types = _list_tokens(tokenizer, vocab_size, is_bpe=bool(merges))
    repeated = [token for token, count in Counter(tokens).items() if count > 1]
    if repeated:  # llama.cpp would abort
        raise TokenizerError(f"{where}: expected different tokens, got {list_some(repeated)} twice; change them")
    writer.add_tokenizer_model("gpt2" if merges else "rwkv")
    if merges:
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    unused = {index for index, kind in enumerate(types) if kind == _UNUSED}
    writer.add_array("tokenizer.ggml.suppress_tokens", sorted({*suppressed, *unused}))
    for add in (writer.add_add_bos_token, writer.add_add_eos_token, writer.add_add_space_prefix):
        add(False)
    unknown = None if merges else tokenizer.get_vocab().get(parts["model"]["unk_token"])
    _add_special_tokens(writer, tokenizer, unknown, needs_bos=bool(merges))
    template = tokenizer.chat_template
    if template:
        is_one = isinstance(template, str)
        writer.add_chat_template(template if is_one else [{"name": k, "template": v} for k, v in template.items()])
    lost = [] if merges else _check_chat(tokenizer)
    return [*_find_oddities(tokenizer, tokens, types, is_bpe=bool(merges)), *lost]


def _read_parts(where: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns the tokenizer.json of a tokenizer that llama.cpp has an equivalent of."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = {} if backend is None else json.loads(backend.to_str())
    faults = _find_faults(parts) if parts else ["no tokenizer.json"]
    if not faults and tokenizer("").input_ids:
        faults = ["tokens added to every text"]
    if faults:
        raise TokenizerError(
            f"{where}: llama.cpp has no equivalent of it: expected single characters, or byte-level BPE that splits "
            f"text as GPT-2 does, got {'; '.join(faults)}; give another tokenizer"
        )
    return parts


def _find_faults(parts: dict[str, Any]) -> list[str]:
    """Finds what a tokenizer does that neither "gpt2" nor "rwkv" does in llama.cpp."""
    model, split = parts["model"], parts["pre_tokenizer"]
    if model["type"] != "BPE":
        return [f"a {model['type']} model"]
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    faults = [f"{name}={model[name]!r}" for name in options if model.get(name)]
    if parts["normalizer"] is not None:
        faults.append(f"a normalizer, {parts['normalizer']['type']}")
    if model["merges"]:
        if not _splits_as_gpt2(split):
            faults.append(f"text split by {split!r}")
        if model.get("ignore_merges"):
            faults.append("tokens that no merges lead to")
    elif split is not None:
        faults.append(f"no merges, but text split by {split!r}")
    else:
        added = {token["content"] for token in parts["added_tokens"]}
        if odd := [each for each in model["vocab"].keys() - added if len(each) != 1]:
            faults.append(f"no merges, but tokens of several characters as {list_some(sorted(odd))}")
    return faults


def _splits_as_gpt2(split: Any) -> bool:
    """Returns whether text is split by GPT-2's pattern, and its bytes are then spelt as characters."""
    if split is None:
        return False
    *first, last = split["pretokenizers"] if split["type"] == "Sequence" else [split]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return False
    if not first:
        return last["use_regex"]
    plain = {"type": "Split", "behavior": "Isolated", "invert": False}
    patterns = [{"Regex": pattern} for pattern in _GPT2_PATTERNS]
    return not last["use_regex"] and len(first) == 1 and first[0] in [{**plain, "pattern": each} for each in patterns]


def _list_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int, *, is_bpe: bool) -> tuple[list[str], list[int]]:
    """Returns the spelling of the token of each id, and its type."""
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    stops = iter([] if is_bpe else _find_traps(tokenizer))
    tokens, types = [], []
    for index in range(vocab_size):
        if index not in by_id and (stop := next(stops, None)) is not None:
            token, kind = rf"\x{stop:02x}", _UNUSED
        elif index not in by_id:  # 0xff is in no text, so this token is never found in one
            token, kind = f"[PAD{index}]" if is_bpe else rf"\xff[PAD{index}]", _UNUSED
        elif index in added and (is_bpe or len(by_id[index]) > 1):
            token, kind = by_id[index], _CONTROL if added[index].special else _USER_DEFINED
        else:
            token, kind = by_id[index] if is_bpe else _escape(by_id[index]), _NORMAL
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _escape(character: str) -> str:
    """Spells a character as "rwkv" reads it: printable ASCII unchanged, other bytes as hexadecimal digits."""
    return "".join(
        chr(byte) if 0x20 <= byte < 0x7F and byte != ord("\\") else rf"\x{byte:02x}" for byte in character.encode()
    )


def _add_special_tokens(
    writer: "gguf.GGUFWriter", tokenizer: PreTrainedTokenizerBase, unknown: int | None, *, needs_bos: bool
) -> None:
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    if bos is None and needs_bos:  # without one, llama.cpp uses token 11
        bos = eos
    for name, index in (("bos", bos), ("eos", eos), ("pad", pad), ("unk", unknown)):
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)


def _find_traps(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Finds the bytes that begin longer tokens and are not tokens themselves.

    After such a byte "rwkv" must find the rest of a token. If it does not, it goes back to the beginning of the text
    forever.
    """
    spelt = [token.encode() for token in tokenizer.get_vocab()]
    return sorted({each[0] for each in spelt if len(each) > 1} - {each[0] for each in spelt if len(each) == 1})


def _check_chat(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns a sentence if llama.cpp would add characters to a chat that a model of characters does not have."""
    known = tokenizer.get_vocab()
    message = next((token for token in known if len(token) == 1), "")
    how, text = "as ChatML, because the tokenizer has no chat template", _CHATML.format(message)
    if tokenizer.chat_template:
        how = "by the tokenizer's chat template"
        try:
            chat = [{"role": "user", "content": message}]
            text = str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
        except Exception:  # a template may raise anything, and expect other messages
            return []
    added = sorted(map(re.escape, tokenizer.get_added_vocab()), key=len, reverse=True)
    missing = sorted(set("".join(re.split("|".join(added), text) if added else text)) - known.keys())
    if not missing:
        return []
    return [
        f"llama.cpp writes a chat {how}, with characters that the model lacks, {list_some(missing)}: ask it for "
        f"completions only, as llama-completion -no-cnv does"
    ]


def _find_oddities(
    tokenizer: PreTrainedTokenizerBase, tokens: list[str], types: list[int], *, is_bpe: bool
) -> list[str]:
    if not is_bpe and (traps := _find_traps(tokenizer)[types.count(_UNUSED) :]):
        return [
            f"characters that are not the model's make llama.cpp hang if they begin in UTF-8 with one of the bytes "
            f"{list_some([*map(hex, traps)])}, as the model's do: leave them out of prompts, or export the model with "
            f"more rows, after model.resize_token_embeddings({len(tokens) + len(traps)})"
        ]
    if is_bpe and tokenizer.eos_token_id is None and len(tokens) > _GPT2_EOS:
        return [
            f"the tokenizer names no end of text, so that llama.cpp ends at token {_GPT2_EOS}, "
            f"{tokens[_GPT2_EOS]!r}: give the tokenizer an eos_token"
        ]
    return []
