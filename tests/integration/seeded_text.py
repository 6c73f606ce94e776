"""Text to train on that is the same on every machine and with every version of Python."""

from __future__ import annotations

import itertools
import random

_SYLLABLES = ["".join(s) for s in itertools.product("bdfklmnprstv", "aeiou", ["", "n", "r", "s"])]


def _words(random_: random.Random, count: int) -> list[str]:
    """A vocabulary in which, as in languages, short words are frequent ones."""
    return [
        "".join(random_.choices(_SYLLABLES, k=1 + number * 3 // count)) for number in range(count)
    ]


def prose(characters: int, seed: int) -> str:
    """Sentences of invented words; about ``characters`` long."""
    random_ = random.Random(seed)
    vocabulary = _words(random.Random(0), 300)
    weights = [1 / (rank + 3) for rank in range(len(vocabulary))]
    text = ""
    while len(text) < characters:
        words = random_.choices(vocabulary, weights, k=random_.randrange(4, 12))
        text += f"{' '.join(words).capitalize()}. "
    return text.strip()


def code(characters: int, seed: int) -> str:
    """Functions that do nothing of use; about ``characters`` long."""
    random_ = random.Random(seed)
    names = _words(random.Random(1), 60)
    text = ""
    while len(text) < characters:
        name, left, right = random_.choices(names, k=3)
        text += (
            f"def {name}({left}, {right}):\n"
            f"    if {left} > {random_.randrange(100)}:\n"
            f"        return {right} * {left}\n"
            f"    return {name}({left} + 1, {right})\n\n"
        )
    return text.strip()
