"""Small tiktoken encodings that need no download, and random texts to encode with them."""

import itertools
import random
import re
from unittest import mock

import tiktoken
from tiktoken_ext import openai_public

END_OF_TEXT = "<|endoftext|>"


def read_pattern(name):
    """Reads the pattern of one of tiktoken's own encodings, without downloading its ranks."""
    names = ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks")
    with mock.patch.multiple(openai_public, **dict.fromkeys(names, lambda *_, **__: {})):
        return openai_public.ENCODING_CONSTRUCTORS[name]()["pat_str"]


PATTERNS = {name: read_pattern(name) for name in ("gpt2", "cl100k_base", "o200k_base")}
TEXT = "We'll see: it's 1234567 o'clock,\n\n  he SAID; they've 12345\tbooks at home.  \n" * 3
ALPHABETS = (
    "".join(map(chr, range(0x80))),
    "  \n\n\t\r\x85\xa0\u2028\u3000\x00\x1c\x7f",
    "abcestdlrvmnABCESTDLRVM''",
    "0123456789\u0663\xbd\xb2",
    "\xe9\xdf\u0131\u017f\u4e2d\u6587\u0416\u0301\u200d\u200c\ufe0f\U0001f642\U0001f44d\U0001f3fd\ufb05\u0149\ufffd",
)


def make_encoding(pattern=PATTERNS["gpt2"], special_tokens=(END_OF_TEXT,), n_merges=300, gap=0, merges=()):
    """Trains a small byte-pair encoding on TEXT by merging the most frequent neighbors, without a library."""
    ranks = {bytes([byte]): (byte * 7) % 256 for byte in range(256)}  # not in the order of the bytes, as in GPT-2
    for token in merges:
        ranks[token] = len(ranks)
    pieces = [[bytes([byte]) for byte in piece.encode()] for piece in re.findall(r"\d{1,3}| ?\w+|\s+|\W", TEXT)]
    while len(ranks) < 256 + n_merges:
        counts: dict[tuple[bytes, bytes], int] = {}
        for piece in pieces:
            for pair in itertools.pairwise(piece):
                counts[pair] = counts.get(pair, 0) + 1
        if not counts:
            break
        left, right = max(counts, key=lambda pair: (counts[pair], pair))
        ranks.setdefault(left + right, len(ranks))
        for piece in pieces:
            for index in reversed(range(len(piece) - 1)):
                if piece[index : index + 2] == [left, right]:
                    piece[index : index + 2] = [left + right]
    special = {token: len(ranks) + gap + index for index, token in enumerate(special_tokens)}
    return tiktoken.Encoding("small", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def make_texts(encoding, n_texts=1000, seed=1):
    """Makes random texts of any code points, of runs of one kind, and of special tokens."""
    rng = random.Random(seed)
    texts = []
    for _ in range(n_texts):
        pieces = []
        for _ in range(rng.randint(1, 6)):
            kind = rng.random()
            if kind < 0.15:
                pieces.append(rng.choice([*encoding._special_tokens, "<|", "endoftext", "|>"]))
            elif kind < 0.3:
                pieces.append("".join(chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))))
            elif kind < 0.5:
                start = rng.randrange(len(TEXT))
                pieces.append(TEXT[start : start + rng.randint(1, 20)])
            else:
                pieces.append("".join(rng.choices(rng.choice(ALPHABETS), k=rng.randint(1, 8))))
        texts.append(rng.choice(["", " ", "  "]) + "".join(pieces))
    return texts


def make_gpt2_encoding():
    """Makes an encoding with GPT-2's size and pattern, whose tokens are pairs of bytes."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {divmod(index, 256): 256 + index for index in range(50000)}
    ranks = {bytes(token): rank for token, rank in ranks.items()}
    special_tokens = {END_OF_TEXT: 50256}
    return tiktoken.Encoding("gpt2", pat_str=PATTERNS["gpt2"], mergeable_ranks=ranks, special_tokens=special_tokens)
