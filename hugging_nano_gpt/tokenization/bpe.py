"""tiktoken's byte-pair encodings as Transformers tokenizers, the same ids on every string; GPT-2's above all.

A tokenizer made here is one tokenizer.json that needs neither this package nor tiktoken. Transformers' own converter
(TikTokenConverter, 5.23) is not used: it numbers special tokens on from the last rank, which is wrong where ids have
gaps (cl100k_base), and passes on a pattern that the regex engine of `tokenizers` reads in another way.
"""

import itertools
import math
import random
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import try_to_load_from_cache
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..errors import TokenizerError, list_some, require
from ..model.configuration_nano_gpt import GPT2_TOKENS

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"

# The names of the two files that GPT-2's tokenizer was published in: Transformers', and OpenAI's own.
_GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_OR_FILES = "or give a folder with its vocab.json and merges.txt, or its encoder.json and vocab.bpe (--tokenizer)"

# The two names that GPT-2 has on the Hub.
_GPT2_REPOSITORIES = ("openai-community/gpt2", "gpt2")

# Characters that two regex engines may treat differently: spaces and line ends of every kind, digits and letters in
# and out of ASCII, joiners, marks, characters that become two in lower case.
_PROBES = (
    "  \n\n\r\t\x0b\x0c\x00\x1c\x7f\x85\xa0\u2028\u3000abcstdlrveSTDLmM''1234567890\xb2\xbd\u0663.,!?/-_\xe9\xdf\u0131"
    "\u017f\u212a\u01c5\u02b0\u4e2d\u6587\u0301\u200d\u200c\ufe0f\U0001f642\U0001f44d\U0001f3fd\ufb05\ufb00\u0149"
)
_N_PROBES = 2000


def build_tiktoken_tokenizer(
    encoding: "str | tiktoken.Encoding", *, block_size: int | None = None
) -> PreTrainedTokenizerFast:
    """Makes a Transformers tokenizer of a tiktoken encoding.

    Ids equal `encoding.encode(text, allowed_special="all")`, and with `split_special_tokens=True` those of
    `encode_ordinary`, with which nanoGPT's prepare.py makes its data. Decoding equals tiktoken's too; an id without a
    token, as in the padding rows of a model, decodes to nothing. Encoding adds no token.

    The special tokens keep their ids. <|endoftext|>, if the encoding has it, is bos, eos and pad.

    Args:
        encoding: A tiktoken.Encoding, or the name of one that tiktoken knows. It keeps most of them on the network.
        block_size: Longest sequence of the model, as model_max_length.

    Raises:
        MissingDependencyError: If a name is given and tiktoken is not installed.
        TokenizerError: If tiktoken cannot provide the encoding, or it has no equal as a tokenizer.json.
    """
    if isinstance(encoding, str):
        encoding = _get_encoding(encoding)
    backend = _build_backend(encoding)
    probe = _make_probe(encoding)
    different = _find_difference(encoding, backend) or _find_difference(probe, _build_backend(probe))
    if different is not None:
        raise TokenizerError(
            f"encoding {encoding.name!r}: has no equal as a tokenizer.json: expected tiktoken's ids of {different!r}, "
            f"got others; its pattern {encoding._pat_str!r} says something that tokenizers reads in another way"
        )
    return wrap_backend(backend, block_size, END_OF_TEXT if END_OF_TEXT in encoding._special_tokens else None)


def build_gpt2_tokenizer(*, block_size: int | None = None) -> PreTrainedTokenizerFast:
    """Makes GPT-2's tokenizer of 50257 tokens, which nanoGPT uses where a data set has no meta.pkl.

    It is read from the Hub's cache on this machine if it is there, and otherwise comes from tiktoken, which keeps a
    cache of its own and fills it from the network. See build_tiktoken_tokenizer for what it does.

    Args:
        block_size: Longest sequence of the model, as model_max_length.

    Raises:
        MissingDependencyError: If it is not in the cache and tiktoken is not installed.
        TokenizerError: If tiktoken cannot provide it, or the cached file is not GPT-2's.
    """
    for repository in _GPT2_REPOSITORIES:
        path = try_to_load_from_cache(repository, "tokenizer.json")
        if isinstance(path, str):
            return wrap_backend(_read_gpt2(Path(path)), block_size, END_OF_TEXT)
    return build_tiktoken_tokenizer("gpt2", block_size=block_size)


def read_gpt2_files(folder: Path, *, block_size: int | None = None) -> PreTrainedTokenizerFast | None:
    """Makes a tokenizer of the two files that GPT-2's was published in, under OpenAI's names or Transformers'.

    Args:
        folder: Folder with encoder.json and vocab.bpe, or vocab.json and merges.txt.
        block_size: Longest sequence of the model, as model_max_length.

    Returns:
        The tokenizer; None if the folder does not have the two.

    Raises:
        TokenizerError: If they cannot be read, or have no <|endoftext|>.
    """
    pairs = [(folder / vocabulary, folder / merges) for vocabulary, merges in _GPT2_FILES]
    found = next((pair for pair in pairs if all(path.is_file() for path in pair)), None)
    if found is None:
        return None
    try:
        backend = Tokenizer(models.BPE.from_file(*map(str, found)))
    except Exception as error:  # tokenizers raises nothing narrower
        raise TokenizerError(
            f"{found[0]}: cannot be read with {found[1].name}: {error}; download both again"
        ) from error
    if backend.token_to_id(END_OF_TEXT) is None:
        raise TokenizerError(
            f"{found[0]}: expected GPT-2's vocabulary, with {END_OF_TEXT}, got one without; give a folder with a "
            f"tokenizer.json, which says how text is cut"
        )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # with GPT-2's pattern
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return wrap_backend(backend, block_size, END_OF_TEXT)


def wrap_backend(backend: Tokenizer, block_size: int | None, end_of_text: str | None) -> PreTrainedTokenizerFast:
    """Wraps a backend with the settings that all tokenizers of this package share.

    Padding goes to the left, as generate() needs it: the next token follows the last one of each row. Text is decoded
    as it is, without any clean-up of spaces.
    """
    settings: dict[str, Any] = {} if block_size is None else {"model_max_length": block_size}
    if end_of_text is not None:
        settings |= {"bos_token": end_of_text, "eos_token": end_of_text, "pad_token": end_of_text}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side="left", clean_up_tokenization_spaces=False, **settings
    )


def _get_encoding(name: str) -> "tiktoken.Encoding":
    require(f"encoding {name!r}", "tiktoken", alternative=_OR_FILES if name == "gpt2" else "")
    import tiktoken

    if name not in tiktoken.list_encoding_names():
        raise TokenizerError(
            f"encoding {name!r}: is not known to tiktoken: expected one of {tiktoken.list_encoding_names()}, got "
            f"another; give one of them, or a folder or a hub id (owner/name) of a tokenizer (--tokenizer)"
        )
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # any failure of the network
        reason = textwrap.shorten(str(error), 120)
        raise TokenizerError(
            f"encoding {name!r}: tiktoken cannot provide it: {type(error).__name__}: {reason}; load it once on a "
            f"machine with network, and keep the folder that TIKTOKEN_CACHE_DIR names"
            f"{f'; {_OR_FILES}' if name == 'gpt2' else ''}"
        ) from error


def _read_gpt2(path: Path) -> Tokenizer:
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise TokenizerError(f"{path}: cannot be read: {error}; delete it, and download it again") from error
    found = (backend.get_vocab_size(), backend.token_to_id(END_OF_TEXT))
    if found != (GPT2_TOKENS, GPT2_TOKENS - 1):
        raise TokenizerError(
            f"{path}: expected GPT-2's {GPT2_TOKENS} tokens, the last of them {END_OF_TEXT}, got {found[0]}, and "
            f"{END_OF_TEXT} is {found[1]}; delete it, and download it again"
        )
    return backend


def _build_backend(encoding: "tiktoken.Encoding") -> Tokenizer:
    ranks, special_tokens = encoding._mergeable_ranks, encoding._special_tokens
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    spellings = _spell_bytes()
    vocabulary = {_spell(token, spellings): rank for token, rank in ranks.items()}
    clashing = [token for token in special_tokens if token in vocabulary]
    if missing or clashing:
        raise TokenizerError(
            f"encoding {encoding.name!r}: has no equal as a tokenizer.json: expected all of the 256 bytes and special "
            f"tokens spelt unlike all others, got {len(missing)} bytes missing and {list_some(clashing)} spelt alike; "
            f"change the encoding"
        )
    merges = {token: _find_merge(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1}
    # A token that no merges lead to is used only where a whole piece of text is that token.
    has_unreachable = None in merges.values()
    pairs = [(_spell(merge[0], spellings), _spell(merge[1], spellings)) for merge in merges.values() if merge]
    backend = Tokenizer(models.BPE({**vocabulary, **special_tokens}, pairs, ignore_merges=has_unreachable))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_translate_pattern(encoding._pat_str)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    # They are in the model's vocabulary already, and so keep their ids and are counted in vocab_size.
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    return backend


def _find_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """Returns the two parts of which tiktoken makes a token of two bytes or more, or None if it never does.

    tiktoken joins any two neighbours whose bytes are a token, lowest rank first, leftmost first. Until a token is
    made, nothing was joined across its ends, so what happened between them is what happens to its bytes alone: the
    two parts are always the same, and one merge a token is all that `tokenizers` needs for the same result.
    """
    parts = [token[index : index + 1] for index in range(len(token))]
    while len(parts) > 2:
        rank, index = min((ranks.get(parts[i] + parts[i + 1], math.inf), i) for i in range(len(parts) - 1))
        if rank == math.inf:
            return None
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return parts[0], parts[1]


def _translate_pattern(pattern: str) -> str:
    """Rewrites what the regex engine of `tokenizers` (Oniguruma) reads in another way than tiktoken's.

    x{1,3}+ there means (x{1,3})+ and not the possessive form; $ and ^ there match at every line.
    """
    pattern = re.sub(
        r"(\\[pP]\{\^?\w+\}|\\.|\[(?:\\.|[^\]\\])*\]|[^\\()\[\]{}|?*+])(\{\d+(?:,\d*)?\})\+", r"(?>\1\2)", pattern
    )
    anchors = {"$": r"\z", "^": r"\A"}
    return re.sub(
        r"\\.|\[(?:\\.|[^\]\\])*\]|[$^]", lambda match: anchors.get(match[0], match[0]), pattern, flags=re.DOTALL
    )


def _spell_bytes() -> list[str]:
    """Returns the character that stands for each byte in a tokenizer.json (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def _spell(token: bytes, spellings: list[str]) -> str:
    return "".join(spellings[byte] for byte in token)


def _make_probe(encoding: "tiktoken.Encoding") -> "tiktoken.Encoding":
    """Makes an encoding of the same pattern that joins any two bytes, so that its ids show where the pattern cuts."""
    pairs = itertools.product(sorted(set("".join(_PROBES).encode())), repeat=2)
    ranks = {token: rank for rank, token in enumerate([bytes([byte]) for byte in range(256)] + [*map(bytes, pairs)])}
    special_tokens = {token: len(ranks) + index for index, token in enumerate(encoding._special_tokens)}
    return type(encoding)(
        encoding.name, pat_str=encoding._pat_str, mergeable_ranks=ranks, special_tokens=special_tokens
    )


def _find_difference(encoding: "tiktoken.Encoding", backend: Tokenizer) -> str | None:
    """Returns a string that the two encode or decode differently, out of those most likely to show it."""
    rng = random.Random(0)  # noqa: S311
    special_tokens = sorted(encoding._special_tokens)
    pieces = [*_PROBES, *special_tokens[:20]]
    texts = ["".join(rng.choices(pieces, k=rng.randint(1, 16))) for _ in range(_N_PROBES)] + special_tokens
    for text, encoded in zip(texts, backend.encode_batch(texts), strict=True):
        ids = encoding.encode(text, allowed_special="all")
        if encoded.ids != ids or backend.decode(ids, skip_special_tokens=False) != text:
            return text
    return None
