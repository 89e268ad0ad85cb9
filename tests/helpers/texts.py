"""A text with all that can go wrong between a file and its tokens: spaces, line ends, and characters of any length."""

import random

WORDS = (
    "the king hath spoken to his daughter; and she wept. It's caf\xe9 \u4e2d\u6587\u3002 1234567 \U0001f642 O!".split()
)
ENDS = ("\n", "\r\n", "\n\n", " ", "  ", "\r", " \n  ")


def make_text(n_words=6000, seed=0):
    """Makes a text with all kinds of spaces and line ends."""
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choices(ENDS, (2, 1, 1, 12, 1, 1, 1))[0] for _ in range(n_words))
