"""Lengths of time: every way of writing one, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossal_llama.durations import seconds_of

UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


@given(st.dictionaries(st.sampled_from(list(UNITS)), st.integers(0, 10**6), min_size=1))
def test_units_add_up_in_their_order(counts: dict[str, int]) -> None:
    text = "".join(f"{counts[unit]}{unit}" for unit in UNITS if unit in counts)
    wanted = sum(count * UNITS[unit] for unit, count in counts.items())
    assert seconds_of(text) == wanted
    assert seconds_of(f"  {text.upper()} ") == wanted


@given(st.integers(0, 10**9))
def test_a_plain_number_is_seconds(number: int) -> None:
    assert seconds_of(str(number)) == number


def test_examples() -> None:
    assert seconds_of("23h30m") == 84600
    assert seconds_of("0") == 0
    assert seconds_of("1.5") == 1.5


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "h", "5x", "-3", "-3m", "30m1h", "1h1h", "1h30", "1.5h", "1 h", "1h 30m"),
        *("nan", "inf", "1e3", "0x10", "1_000", "1:30:00", "one", "3 600"),
    ],
)
def test_what_is_no_time(text: str) -> None:
    assert seconds_of(text) is None
