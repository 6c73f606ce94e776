"""How the figures of an analysis read, in a terminal and on a page alike."""

from __future__ import annotations

from colossal_llama.tokenizer.analysis import HalfFigures, Part, TokenizerFigures


def per_half(figures: TokenizerFigures, texts: dict[str, str]) -> str:
    """One text for both halves if they say the same, else "slow / fast"."""
    return (
        next(iter(texts.values()))
        if len(set(texts.values())) == 1
        else " / ".join(texts[name] for name in figures.halves)
    )


def count(number: int | None) -> str:
    """A count with thousands apart; "–" where there is none."""
    return "–" if number is None else f"{number:,}"


def percent(share: float) -> str:
    """A share as a percentage that says 0 and 100 only where that is exact."""
    text = f"{share:.2%}"
    if share < 1 and text == "100.00%":
        return "99.99%"
    return "0.01%" if share > 0 and text == "0.00%" else text


def unreachable_count(half: HalfFigures) -> int | None:
    """The number of unreachable pieces; None where it cannot be said."""
    return None if half.unreachable is None else len(half.unreachable)


def difference(figures: TokenizerFigures) -> dict[str, str]:
    """Where the halves first differ, and the pieces of both there; empty if they never do."""
    found = figures.agreement.first_difference if figures.agreement else None
    if not found:
        return {}
    return {
        "where": f"{found['file']}, document {found['document']}, token {found['token']}",
        **{name: visible("|".join(found[name])) for name in ("slow", "fast")},
    }


def shortened(piece: str) -> str:
    """A piece on one line, a long one cut in the middle and its length given."""
    text = visible(piece)
    return text if len(text) <= 24 else f"{text[:10]}…{text[-4:]} ({len(text)} characters)"


def visible(text: str) -> str:
    """``text`` on one line, with line ends and other control characters as signs one can see."""
    signs = {"\n": "↵", "\t": "⇥", "\x7f": "␡"}
    return "".join(
        signs.get(c) or (chr(0x2400 + ord(c)) if ord(c) < 32 else c if c.isprintable() else "·")
        for c in text
    )


def splits(figures: TokenizerFigures) -> list[tuple[str, list[Part]]]:
    """(label, parts) of the sentence: one, or one per half where they differ."""
    halves = figures.halves
    if len({repr(half.split) for half in halves.values()}) == 1:
        return [(figures.name, figures.main.split)]
    return [(f"{figures.name} ({name})", half.split) for name, half in halves.items()]
