"""tiktoken's byte-pair encodings, GPT-2's among them, as Transformers tokenizers with the same ids for every string.

Each tokenizer is a single tokenizer.json that needs neither this package nor tiktoken. Transformers' own converter
(TikTokenConverter, 5.23) is not used: it gives special tokens the ids after the last rank, which is wrong where ids
have gaps (cl100k_base), and it does not adapt the pattern to the regex engine of `tokenizers`.
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

# GPT-2's tokenizer was published in two files: their names in Transformers, and those of OpenAI.
_GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_OR_FILES = "or give a folder with its vocab.json and merges.txt, or its encoder.json and vocab.bpe (--tokenizer)"

# GPT-2's two names on the Hub.
_GPT2_REPOSITORIES = ("openai-community/gpt2", "gpt2")

# Characters that two regex engines may treat differently: all kinds of spaces and line ends, digits and letters inside
# and outside ASCII, joiners, marks, characters whose lower case is two characters.
_PROBES = (
    "  \n\n\r\t\x0b\x0c\x00\x1c\x7f\x85\xa0\u2028\u3000abcstdlrveSTDLmM''1234567890\xb2\xbd\u0663.,!?/-_\xe9\xdf\u0131"
    "\u017f\u212a\u01c5\u02b0\u4e2d\u6587\u0301\u200d\u200c\ufe0f\U0001f642\U0001f44d\U0001f3fd\ufb05\ufb00\u0149"
)
_N_PROBES = 2000


def build_tiktoken_tokenizer(
    encoding: "str | tiktoken.Encoding", *, block_size: int | None = None
) -> PreTrainedTokenizerFast:
    """Builds a Transformers tokenizer from a tiktoken encoding.

    Its ids equal `encoding.encode(text, allowed_special="all")`, or with `split_special_tokens=True` those of
    `encode_ordinary`, which nanoGPT's prepare.py uses. Decoding equals tiktoken's too; an id without a token, such as
    a padding row of a model, decodes to the empty string. Encoding adds no tokens.

    The special tokens keep their ids. <|endoftext|>, if the encoding has it, is bos, eos and pad.

    Args:
        encoding: A tiktoken.Encoding, or a name that tiktoken knows. tiktoken downloads most of its encodings.
        block_size: Longest sequence of the model; becomes model_max_length.

    Raises:
        MissingDependencyError: If a name is given and tiktoken is not installed.
        TokenizerError: If tiktoken cannot provide the encoding, or a tokenizer.json cannot express it.
    """
    if isinstance(encoding, str):
        encoding = get_encoding(encoding)
    backend = _build_backend(encoding)
    probe = _make_probe(encoding)
    different = _find_difference(encoding, backend) or _find_difference(probe, _build_backend(probe))
    if different is not None:
        raise TokenizerError(
            f"encoding {encoding.name!r}: has no equal as a tokenizer.json: expected tiktoken's ids of {different!r}, "
            f"got others; its pattern {encoding._pat_str!r} has a part that tokenizers reads in another way"
        )
    return wrap_backend(backend, block_size, END_OF_TEXT if END_OF_TEXT in encoding._special_tokens else None)


def build_gpt2_tokenizer(*, block_size: int | None = None) -> PreTrainedTokenizerFast:
    """Builds GPT-2's tokenizer of 50257 tokens, which nanoGPT uses for data sets without a meta.pkl.

    It is read from the Hub's cache on this machine if it is there. Otherwise it comes from tiktoken, as in
    build_tiktoken_tokenizer, which describes the tokenizer and its arguments.

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
    """Builds a tokenizer from a folder with vocab.json and merges.txt, or encoder.json and vocab.bpe.

    Returns:
        The tokenizer; None if the folder has neither pair of files.

    Raises:
        TokenizerError: If the files cannot be read, or have no <|endoftext|>.
    """
    pairs = [(folder / vocabulary, folder / merges) for vocabulary, merges in _GPT2_FILES]
    found = next((pair for pair in pairs if all(path.is_file() for path in pair)), None)
    if found is None:
        return None
    try:
        backend = Tokenizer(models.BPE.from_file(*map(str, found)))
    except Exception as error:  # tokenizers raises no narrower type
        raise TokenizerError(
            f"{found[0]}: cannot be read with {found[1].name}: {error}; download both again"
        ) from error
    if backend.token_to_id(END_OF_TEXT) is None:
        raise TokenizerError(
            f"{found[0]}: expected GPT-2's vocabulary, with {END_OF_TEXT}, got one without; give a folder with a "
            f"tokenizer.json, which says how text is split"
        )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # with GPT-2's pattern
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return wrap_backend(backend, block_size, END_OF_TEXT)


def wrap_backend(backend: Tokenizer, block_size: int | None, end_of_text: str | None) -> PreTrainedTokenizerFast:
    """Wraps a backend, with the arguments that all tokenizers of this package share.

    Padding is on the left, as generate() needs it: the next token follows the last token of each row. Decoding does
    not clean up spaces.
    """
    kwargs: dict[str, Any] = {} if block_size is None else {"model_max_length": block_size}
    if end_of_text is not None:
        kwargs |= {"bos_token": end_of_text, "eos_token": end_of_text, "pad_token": end_of_text}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side="left", clean_up_tokenization_spaces=False, **kwargs
    )


def get_encoding(name: str) -> "tiktoken.Encoding":
    """Returns tiktoken's encoding of a name.

    Raises:
        MissingDependencyError: If tiktoken is not installed.
        TokenizerError: If it does not know the name, or cannot provide the encoding.
    """
    require(f"encoding {name!r}", "tiktoken", alternative=_OR_FILES if name == "gpt2" else "")
    import tiktoken

    if name not in tiktoken.list_encoding_names():
        raise TokenizerError(
            f"encoding {name!r}: is not known to tiktoken: expected one of {tiktoken.list_encoding_names()}, got "
            f"another; give one of them, or a folder or a hub id (owner/name) of a tokenizer (--tokenizer)"
        )
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # tiktoken passes on any error of the network
        reason = textwrap.shorten(str(error), 120)
        raise TokenizerError(
            f"encoding {name!r}: tiktoken cannot provide it: {type(error).__name__}: {reason}; load it once on a "
            f"machine with network, and copy the folder that TIKTOKEN_CACHE_DIR names"
            f"{f'; {_OR_FILES}' if name == 'gpt2' else ''}"
        ) from error


def _read_gpt2(path: Path) -> Tokenizer:
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no narrower type
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
            f"encoding {encoding.name!r}: has no equal as a tokenizer.json: expected all 256 bytes and special tokens "
            f"unlike all others, got {len(missing)} bytes missing and {list_some(clashing)} as another token too; "
            f"change the encoding"
        )
    merges = {token: _find_merge(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1}
    # A token that merges never produce is used only if a whole piece of the split text is that token.
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
    # They are already in the model's vocabulary, so they keep their ids and are counted in vocab_size.
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    return backend


def _find_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """Returns the two parts that tiktoken merges into a token of at least two bytes, or None if it never does.

    tiktoken merges any two neighbors whose bytes are a token: lowest rank first, then leftmost. Before a token
    appears, nothing was merged across its ends, so its two parts depend on its own bytes only. They are always the
    same, and one merge per token is all that `tokenizers` needs for the same result.
    """
    parts = [token[index : index + 1] for index in range(len(token))]
    while len(parts) > 2:
        rank, index = min((ranks.get(parts[i] + parts[i + 1], math.inf), i) for i in range(len(parts) - 1))
        if rank == math.inf:
            return None
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return parts[0], parts[1]


def _translate_pattern(pattern: str) -> str:
    """Rewrites the parts of a pattern that the regex engine of `tokenizers` (Oniguruma) reads in another way.

    In Oniguruma, x{1,3}+ means (x{1,3})+ and not the possessive quantifier, and $ and ^ match at every line.
    """
    pattern = re.sub(
        r"(\\[pP]\{\^?\w+\}|\\.|\[(?:\\.|[^\]\\])*\]|[^\\()\[\]{}|?*+])(\{\d+(?:,\d*)?\})\+", r"(?>\1\2)", pattern
    )
    anchors = {"$": r"\z", "^": r"\A"}
    return re.sub(
        r"\\.|\[(?:\\.|[^\]\\])*\]|[$^]", lambda match: anchors.get(match[0], match[0]), pattern, flags=re.DOTALL
    )


def _spell_bytes() -> list[str]:
    """Returns the character that spells each byte in a tokenizer.json (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def _spell(token: bytes, spellings: list[str]) -> str:
    return "".join(spellings[byte] for byte in token)


def _make_probe(encoding: "tiktoken.Encoding") -> "tiktoken.Encoding":
    """Makes an encoding with the same pattern that merges any two bytes: its ids show where the pattern splits."""
    pairs = itertools.product(sorted(set("".join(_PROBES).encode())), repeat=2)
    ranks = {token: rank for rank, token in enumerate([bytes([byte]) for byte in range(256)] + [*map(bytes, pairs)])}
    special_tokens = {token: len(ranks) + index for index, token in enumerate(encoding._special_tokens)}
    return type(encoding)(
        encoding.name, pat_str=encoding._pat_str, mergeable_ranks=ranks, special_tokens=special_tokens
    )


def _find_difference(encoding: "tiktoken.Encoding", backend: Tokenizer) -> str | None:
    """Returns a string that the two encode or decode differently, or None if no such string is found."""
    rng = random.Random(0)  # noqa: S311
    special_tokens = sorted(encoding._special_tokens)
    pieces = [*_PROBES, *special_tokens[:20]]
    texts = ["".join(rng.choices(pieces, k=rng.randint(1, 16))) for _ in range(_N_PROBES)] + special_tokens
    for text, encoded in zip(texts, backend.encode_batch(texts), strict=True):
        ids = encoding.encode(text, allowed_special="all")
        if encoded.ids != ids or backend.decode(ids, skip_special_tokens=False) != text:
            return text
    return None
