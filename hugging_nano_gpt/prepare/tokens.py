"""From texts to tokens: by characters, or by a tokenizer, whose tiktoken encoding is used where it has one.

A text is encoded in pieces. They are cut where no token can cross: where a letter or a digit comes before a space, a
line end or a CJK full stop or comma. The patterns of GPT-2, cl100k and o200k split there, and cannot see across. Other
tokenizers may not, so every cut is tried first.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
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

MOST_IDS = 1 << 16  # nanoGPT's files are uint16

_CUT = re.compile(r"[^\W_](?=[\s\u3001\u3002\uff0c])")
_WINDOW = 1000  # characters on each side of a cut that are encoded to try it
_N_TRIED = 10  # cuts tried in a block, from its end

_BYTES = 256


class CharacterTokens:
    """The ids of data/shakespeare_char/prepare.py (@ 3adf61e): characters in the order of their code points."""

    def __init__(self, characters: tuple[str, ...]):
        _check_size("char", len(characters))
        self.table = CharacterTable(characters)
        self.n_ids = len(characters)
        self.notes: list[str] = []
        points = to_code_points("".join(characters))
        self._ids = np.zeros(int(points.max()) + 1, dtype=np.uint16)
        self._ids[points] = np.arange(len(points))

    def encode(self, texts: list[str]) -> np.ndarray:
        """Returns the ids of a text's blocks, uint16."""
        return self._ids[to_code_points("".join(texts))]

    def encode_documents(self, texts: list[str]) -> np.ndarray:
        """Returns the ids of documents, uint16, with a newline after each."""
        return self.encode([f"{text}\n" for text in texts])

    def cut(self, blocks: Iterable[list[str]]) -> Iterable[list[str]]:
        """Returns the blocks of a text, which may be cut anywhere."""
        return blocks

    def save(self, folder: Path) -> None:
        """Writes the meta.pkl."""
        write_meta(self.table, folder / "meta.pkl")


class TokenizerTokens:
    """The ids of a tokenizer, which takes special tokens in a text for ordinary text, as encode_ordinary does.

    Args:
        name: The tokenizer's name, for messages.
        tokenizer: The tokenizer.
        encoding: tiktoken's encoding of the same ids, which is about 5 times as fast.

    Raises:
        TokenizerError: If the tokenizer has ids that do not fit uint16, or has no tokenizer.json.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, encoding: "tiktoken.Encoding | None" = None):
        if not tokenizer.is_fast:
            raise TokenizerError(
                f"{name}: expected a tokenizer with a tokenizer.json, got {type(tokenizer).__name__}; give another"
            )
        self.n_ids = count_ids(tokenizer)
        _check_size(name, self.n_ids)
        self.notes: list[str] = []
        self._name, self._tokenizer, self._encoding = name, tokenizer, encoding
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self._end = np.array([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype=np.uint16)

    def encode(self, texts: list[str]) -> np.ndarray:
        """Returns the ids of texts, one after the other, uint16."""
        return np.concatenate(self._encode_each(texts))

    def encode_documents(self, texts: list[str]) -> np.ndarray:
        """Returns the ids of documents, uint16, with the end of text after each, if the tokenizer has one."""
        return np.concatenate([part for ids in self._encode_each(texts) for part in (ids, self._end)])

    def _encode_each(self, texts: list[str]) -> list[np.ndarray]:
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

    def cut(self, blocks: Iterable[list[str]]) -> Iterator[list[str]]:
        """Yields a text in pieces whose ids are those of the whole text; without a place to cut, all of it."""
        return cut_text(("".join(block) for block in blocks), lambda text: self._encode_each([text])[0])

    def describe(self, texts: list[str], are_documents: bool) -> None:
        """Notes what the tokenizer loses of some texts, and that it has no end of text for documents."""
        unknown = self._tokenizer.unk_token_id
        for text, ids in zip(texts, self._encode_each(texts), strict=True):
            n_unknown = (
                0 if unknown is None or unknown == self._tokenizer.eos_token_id else int((ids == unknown).sum())
            )
            if n_unknown:
                self.notes.append(f"{self._name}: {n_unknown} of the first {len(ids)} tokens are the unknown token")
            elif self._backend.decode(ids.tolist(), skip_special_tokens=False) != text:
                self.notes.append(f"{self._name}: does not give the text back when it decodes: it loses some of it")
            if self.notes:
                break
        if are_documents and not len(self._end):
            self.notes.append(f"{self._name}: has no end of text, so nothing separates the documents")

    def save(self, folder: Path) -> None:
        """Writes the tokenizer's files, and for all but GPT-2's a meta.pkl for nanoGPT's train.py and sample.py."""
        self._tokenizer.save_pretrained(folder)
        if (self.n_ids, self._tokenizer.convert_tokens_to_ids(END_OF_TEXT)) != (GPT2_TOKENS, GPT2_TOKENS - 1):
            texts = [self._backend.decode([index], skip_special_tokens=False) for index in range(self.n_ids)]
            write_token_meta(texts, folder / "meta.pkl")


Tokens = CharacterTokens | TokenizerTokens


def load_tokens(name: str, source: Texts | Documents, has_bar: bool) -> Tokens:
    """Makes what encodes a source, by a name: char, bpe:N, a tiktoken encoding, or a tokenizer's folder or Hub id.

    Raises:
        TokenizerError: If there is no such tokenizer, or its ids do not fit uint16.
        MissingDependencyError: If it needs tiktoken, which is not installed.
    """
    if name == "char":
        return CharacterTokens(source.alphabet.characters)
    if match := re.fullmatch(r"bpe:(\d+)", name):
        backend = _train_bpe(name, int(match[1]), source, has_bar)
        tokens = TokenizerTokens(name, wrap_backend(backend, None, END_OF_TEXT))
        if tokens.n_ids < int(match[1]):
            tokens.notes.append(f"{name}: the text has only {tokens.n_ids} tokens that occur twice or are bytes")
    else:
        tokens = TokenizerTokens(name, load_named(name, None), _find_encoding(name))
    first = next(iter(source.read("train")))
    tokens.describe([text[: 100 * _WINDOW] for text in first], source.are_documents)
    return tokens


def _find_encoding(name: str) -> "tiktoken.Encoding | None":
    """Returns tiktoken's encoding of a name; None if it is not one, or GPT-2's was found without tiktoken."""
    with contextlib.suppress(TokenizerError, MissingDependencyError):
        return None if Path(name).is_dir() else get_encoding(name)
    return None


def _check_size(name: str, n_ids: int) -> None:
    if n_ids > MOST_IDS:
        raise TokenizerError(
            f"{name}: expected at most {MOST_IDS:,} tokens, as nanoGPT's uint16 files can contain, got {n_ids:,}; "
            f"give a smaller tokenizer, such as --tokenizer gpt2 or bpe:32000"
        )


def _train_bpe(name: str, n_ids: int, source: Texts | Documents, has_bar: bool) -> Tokenizer:
    """Trains a byte-level BPE with GPT-2's pattern on the train split; id 0 is <|endoftext|>, then come the bytes."""
    _check_size(name, n_ids)
    if n_ids <= _BYTES:
        raise TokenizerError(
            f"{name}: expected at least {_BYTES + 1} tokens, which are all bytes and {END_OF_TEXT}, got {n_ids}; give "
            f"more, as --tokenizer bpe:8000"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_ids,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=has_bar,
    )
    backend.train_from_iterator((text for texts in source.read("train") for text in texts), trainer)
    return backend


def cut_text(blocks: Iterable[str], encode: Callable[[str], np.ndarray]) -> Iterator[list[str]]:
    """Yields a text in pieces, cut in each block at the last place across which `encode` sees nothing."""
    parts: list[str] = []  # of the piece that is not cut yet
    for block in blocks:
        position = _find_cut(parts[-1] if parts else "", block, encode)
        parts.append(block[:position])
        if position is not None:
            yield ["".join(parts)]
            parts = [block[position:]]
    if text := "".join(parts):
        yield [text]


def _find_cut(before: str, block: str, encode: Callable[[str], np.ndarray]) -> int | None:
    """Returns the last position in a block where its text can be cut, or None if none is found."""
    end = len(block) - _WINDOW
    positions = [match.end() for match in _CUT.finditer(block, max(end - 100 * _WINDOW, 0), max(end, 0))]
    for position in positions[: -_N_TRIED - 1 : -1]:
        left = (before[-_WINDOW:] + block[:position])[-_WINDOW:]
        right = block[position : position + _WINDOW]
        if np.array_equal(encode(left + right), np.concatenate([encode(left), encode(right)])):
            return position
    return None
