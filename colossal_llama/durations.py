"""Lengths of time as people write them."""

from __future__ import annotations

import re

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def seconds_of(text: str) -> float | None:
    """Seconds of ``2d``, ``23h30m``, ``45m``, ``90s`` or plain ``3600``; None if it is no time."""
    text = text.strip().lower()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if not text or match is None:
        return None
    return float(sum(int(n or 0) * _UNITS[u] for n, u in zip(match.groups(), "dhms", strict=True)))
