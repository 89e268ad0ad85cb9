"""From texts to tokens: by characters, or by a tokenizer, whose tiktoken encoding is used where it has one.

A text is encoded in pieces. They are cut where no token can cross: where a letter or a digit comes before a space, a
line end or a CJK full stop or comma. The patterns of GPT-2, cl100k and o200k split there, and cannot see across. Other
tokenizers may not, so every cut is tried first.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase

from ..errors import MissingDependencyError, TokenizerError, list_some
from ..model.configuration_nano_gpt import GPT2_TOKENS
from ..tokenization.bpe import END_OF_TEXT, get_encoding, wrap_backend
from ..tokenization.characters import CharacterTable, write_meta, write_token_meta
from ..tokenization.find import count_ids, load_named
from ..tokenization.text import find_unknown
from .sources import Documents, Texts, to_code_points

if TYPE_CHECKING:
    import tiktoken

_MOST_IDS = 1 << 16  # nanoGPT's files are uint16
_LEAST_BPE_IDS = 257  # all bytes and <|endoftext|>

_CUT = re.compile(r"[^\W_](?=[\s\u3001\u3002\uff0c])")
_WINDOW = 1000  # characters on each side of a cut that are encoded to try it
_N_TRIED = 10  # cuts tried in a block, from its end

_SAMPLE_LENGTH = 100_000  # characters that are decoded again to see what a tokenizer loses


class CharacterTokens:
    """The ids of data/shakespeare_char/prepare.py (@ 3adf61e): characters in the order of their code points."""

    def __init__(self, characters: tuple[str, ...]):
        _check_size("char", len(characters))
        self.table, self.n_ids = CharacterTable(characters), len(characters)
        points = to_code_points("".join(characters))
        self._ids = np.zeros(int(points.max()) + 1, dtype=np.uint16)
        self._ids[points] = np.arange(len(points))
        (self.end,) = self.encode_each(["\n"] if "\n" in characters else [""])  # after each document

    def encode_each(self, texts: list[str]) -> list[np.ndarray]:
        """Returns the ids of each text, uint16."""
        return [self._ids[to_code_points(text)] for text in texts]

    def describe(self, _texts: list[str], _are_documents: bool) -> list[str]:
        """Returns no notes, because nothing is lost."""
        return []

    def save(self, folder: Path) -> None:
        """Writes the meta.pkl."""
        write_meta(self.table, folder / "meta.pkl")


class TokenizerTokens:
    """The ids of a tokenizer, which takes special tokens in a text for ordinary text, as encode_ordinary does.

    Args:
        name: The tokenizer's name, for messages.
        tokenizer: The tokenizer.
        encoding: tiktoken's encoding of the same ids, which is about 5 times as fast.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, encoding: "tiktoken.Encoding | None" = None):
        if not tokenizer.is_fast:
            raise TokenizerError(
                f"{name}: expected a tokenizer with a tokenizer.json, got {type(tokenizer).__name__}; give another"
            )
        self._name, self._tokenizer, self._encoding = name, tokenizer, encoding
        self.n_ids, self._eos = count_ids(tokenizer), tokenizer.eos_token_id
        _check_size(name, self.n_ids)
        self.end = np.array([] if self._eos is None else [self._eos], dtype=np.uint16)  # after each document
        self._backend = tokenizer.backend_tokenizer
        if encoding is None:
            self._backend = Tokenizer.from_str(self._backend.to_str())  # a copy, for other settings
            self._backend.encode_special_tokens = True
            self._backend.no_truncation()
            self._backend.no_padding()

    def encode_each(self, texts: list[str]) -> list[np.ndarray]:
        """Returns the ids of each text, uint16."""
        if self._encoding is not None:
            return [self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16) for text in texts]
        try:
            encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # `tokenizers` raises no narrower type, and does not say which character it was
            unknown = sorted(find_unknown(self._tokenizer, "".join(texts)))
            raise TokenizerError(
                f"{self._name}: expected characters of the tokenizer's {self.n_ids}, got {list_some(unknown)}; give "
                f"another --tokenizer, or leave them out"
            ) from error
        return [np.array(each.ids, dtype=np.uint16) for each in encoded]

    def describe(self, texts: list[str], are_documents: bool) -> list[str]:
        """Returns notes on what is lost of some texts, and on documents that nothing separates."""
        sample = [text[:_SAMPLE_LENGTH] for text in texts]
        ids = [each.tolist() for each in self.encode_each(sample)]
        unknown = self._tokenizer.unk_token_id
        n_unknown = 0 if unknown in (None, self._eos) else sum(each.count(unknown) for each in ids)
        notes = []
        if n_unknown:
            notes.append(f"{n_unknown} of the first {sum(map(len, ids))} tokens are the unknown token")
        elif self._backend.decode_batch(ids, skip_special_tokens=False) != sample:
            notes.append("loses some of the text: its tokens decode to another one")
        if are_documents and self._eos is None:
            notes.append("has no end-of-text token, so nothing separates the documents")
        return [f"{self._name}: {note}" for note in notes]

    def save(self, folder: Path) -> None:
        """Writes the tokenizer's files, and for all but GPT-2's a meta.pkl for nanoGPT's train.py and sample.py."""
        self._tokenizer.save_pretrained(folder)
        if (self.n_ids, self._tokenizer.convert_tokens_to_ids(END_OF_TEXT)) != (GPT2_TOKENS, GPT2_TOKENS - 1):
            texts = self._backend.decode_batch([[index] for index in range(self.n_ids)], skip_special_tokens=False)
            write_token_meta(texts, folder / "meta.pkl")


Tokens = CharacterTokens | TokenizerTokens


def load_tokens(name: str, source: Texts | Documents, has_bar: bool) -> Tokens:
    """Makes what encodes a source, by a name: char, bpe:N, a tiktoken encoding, or a tokenizer's folder or Hub id."""
    if name == "char":
        return CharacterTokens(source.characters)
    if match := re.fullmatch(r"bpe:(\d+)", name):
        return TokenizerTokens(name, wrap_backend(_train_bpe(name, int(match[1]), source, has_bar), None, END_OF_TEXT))
    tokenizer, encoding = load_named(name, None), None
    if "/" not in name and not Path(name).is_dir():
        with contextlib.suppress(TokenizerError, MissingDependencyError):  # GPT-2's may be in the Hub's cache alone
            encoding = get_encoding(name)
    return TokenizerTokens(name, tokenizer, encoding)


def _check_size(name: str, n_ids: int) -> None:
    if n_ids > _MOST_IDS:
        raise TokenizerError(
            f"{name}: expected at most {_MOST_IDS:,} tokens, as nanoGPT's uint16 files can contain, got {n_ids:,}; "
            f"give a smaller tokenizer, such as --tokenizer gpt2 or bpe:32000"
        )


def _train_bpe(name: str, n_ids: int, source: Texts | Documents, has_bar: bool) -> Tokenizer:
    """Trains a byte-level BPE with GPT-2's pattern on the train split; id 0 is <|endoftext|>, then come the bytes."""
    _check_size(name, n_ids)
    if n_ids < _LEAST_BPE_IDS:
        raise TokenizerError(
            f"{name}: expected at least {_LEAST_BPE_IDS} tokens, which are all bytes and {END_OF_TEXT}, got {n_ids}; "
            f"give more, as --tokenizer bpe:8000"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=n_ids,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=has_bar,
    )
    backend.train_from_iterator((text for texts in source.read("train") for text in texts), trainer)
    return backend


def cut_text(blocks: Iterable[list[str]], tokens: Tokens) -> Iterator[list[str]]:
    """Yields a text in pieces whose ids are those of the whole text; without a place to cut, all of it."""
    parts: list[str] = []  # of the piece that is not cut yet
    for block in map("".join, blocks):
        position = _find_cut(parts[-1] if parts else "", block, tokens)
        parts.append(block[:position])
        if position is not None:
            yield ["".join(parts)]
            parts = [block[position:]]
    if text := "".join(parts):
        yield [text]


def _find_cut(before: str, block: str, tokens: Tokens) -> int | None:
    """Returns the last position of a block at which its text can be cut, or None if none is found."""
    end = max(len(block) - _WINDOW, 0)
    positions = [match.end() for match in _CUT.finditer(block, max(end - 10 * _WINDOW, 0), end)]
    for position in positions[: -_N_TRIED - 1 : -1]:
        left = (before[-_WINDOW:] + block[:position])[-_WINDOW:]
        right = block[position : position + _WINDOW]
        whole, *parts = tokens.encode_each([left + right, left, right])
        if np.array_equal(whole, np.concatenate(parts)):
            return position
    return None
