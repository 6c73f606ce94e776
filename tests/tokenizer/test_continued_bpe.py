"""The next merges of a tokenizer: producible, in the order of what they save, within its words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, trainers
from tokenizers import pre_tokenizers as pre

from colossal_llama import command
from colossal_llama.errors import DataError
from colossal_llama.tokenizer.continued_bpe import learn
from colossal_llama.tokenizer.directory import read_tokenizer
from colossal_llama.tokenizer.extensible import ExtensibleTokenizer
from colossal_llama.tokenizer.extension import extend
from colossal_llama.tokenizer.train_tokenizer import TrainTokenizerOptions, train_tokenizer
from colossal_llama.tokenizer.unicode_scripts import script_filter

# Llama 3's words, from its tokenizer.json.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHINESE = [
    "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。",
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "葡萄美酒夜光杯，欲饮琵琶马上催。葡萄葡萄。",
] * 3


@pytest.fixture(scope="module", params=["gpt2", "llama3"])
def byte_level(
    request: pytest.FixtureRequest, english: list[str], tmp_path_factory: pytest.TempPathFactory
) -> ExtensibleTokenizer:
    """A small byte-level BPE tokenizer learned from English."""
    cut = pre.Sequence(
        [pre.Split(Regex(LLAMA_3), "isolated"), pre.ByteLevel(False, use_regex=False)]
    )
    tokenizer = Tokenizer(models.BPE(ignore_merges=request.param == "llama3"))
    tokenizer.pre_tokenizer = cut if request.param == "llama3" else pre.ByteLevel(False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(english, trainer)
    directory = tmp_path_factory.mktemp(request.param)
    tokenizer.save(str(directory / "tokenizer.json"))
    return read_tokenizer(directory)


def next_pieces(
    source: ExtensibleTokenizer,
    lines: list[str],
    count: int,
    scripts: str = "",
    required: tuple[str, ...] = (),
) -> list[str]:
    return learn(
        source,
        lines,
        count,
        scripts=script_filter(scripts.split(",") if scripts else []),
        required=[source.spell(character) for character in required],
        coverage=1.0,
        max_length=16,
    )


def tokens(source: ExtensibleTokenizer, texts: list[str]) -> int:
    return sum(map(len, source.encode(texts)))


def check(source: ExtensibleTokenizer, pieces: list[str], texts: list[str]) -> None:
    """No repairs, nothing dropped, halves agree, and every prefix of the list stands alone."""
    assert len(pieces) == len(set(pieces))
    assert set(pieces).isdisjoint(source.pieces())
    before = tokens(source, texts)
    for count in (len(pieces) // 8, len(pieces) // 2, len(pieces)):
        found = extend(source, pieces[:count], on_unreachable="error")
        assert found.pieces == pieces[:count]
        assert found.tokenizer.disagreements(texts) == []
        after = tokens(found.tokenizer, texts)
        assert after < before
        before = after


def test_sentencepiece(small: Path, english: list[str]) -> None:
    source = read_tokenizer(small)
    lines = [line for text in english for line in text.splitlines() if line]
    pieces = next_pieces(source, lines, 400)
    assert len(pieces) == 400
    assert next_pieces(source, lines, 150) == pieces[:150]
    check(source, pieces, english[:20])
    text = "\n".join(lines).replace(" ", "▁")
    for piece in pieces:
        assert "▁" not in piece[1:], piece
        assert text.count(piece) > 1, piece
        assert len(piece) <= 16


def test_byte_level(byte_level: ExtensibleTokenizer, english: list[str]) -> None:
    """Within the tokenizer's own words: each piece is one of them, or a part of one."""
    lines = [line for text in english for line in text.splitlines() if line]
    pieces = next_pieces(byte_level, lines, 300)
    assert len(pieces) == 300
    check(byte_level, pieces, english[:20])
    cut = Tokenizer.from_str(json.dumps(byte_level.fast)).pre_tokenizer
    words = {word for line in lines for word, _ in cut.pre_tokenize_str(line)}
    assert all(any(piece in word for word in words) for piece in pieces)


def test_new_characters_of_bytes(byte_level: ExtensibleTokenizer) -> None:
    """The cut characters on the way are in the list, before the first that needs them."""
    pieces = next_pieces(byte_level, CHINESE, 60)
    assert len(pieces) == 60
    check(byte_level, pieces, CHINESE[:3])
    assert any("\ufffd" in byte_level.text(piece) for piece in pieces)


def test_the_report_counts_cut_characters_apart(
    byte_level: ExtensibleTokenizer, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("\n".join(CHINESE), encoding="utf-8")
    flags = ["--data_input_dirs", tmp_path / "text.txt", "--num_new_pieces", 60]
    flags += ["--source_tokenizer_dir", byte_level.path, "--target_tokenizer_dir", tmp_path / "out"]
    assert command.run(TrainTokenizerOptions, train_tokenizer, list(map(str, flags))) == 0
    report = json.loads((tmp_path / "out" / "extension_report.json").read_text(encoding="utf-8"))
    lines = (tmp_path / "out" / "pieces.jsonl").read_text(encoding="utf-8").splitlines()
    whole = [json.loads(line)["piece"] for line in lines]
    characters = sum(len(piece) == 1 for piece in whole)
    assert report["learned"] == {
        "characters": characters,
        "merges": len(whole) - characters,
        "cut_characters": 60 - len(whole),
    }
    assert 0 < characters < len(whole) < 60


def test_characters_are_learned_whole_and_first(small: Path) -> None:
    """葡 and 萄 only ever stand together; even so both are pieces before 葡萄 is."""
    source = read_tokenizer(small)
    pieces = next_pieces(source, CHINESE, 200)
    known = set(source.pieces())
    for place, piece in enumerate(pieces):
        earlier = known.union(pieces[:place])
        assert len(piece) == 1 or set(piece) <= earlier, piece
        assert len(piece) == 1 or any(
            piece[:at] in earlier and piece[at:] in earlier for at in range(1, len(piece))
        ), piece
    assert "葡萄" in pieces
    check(source, pieces, CHINESE[:3])


def test_a_character_is_not_cut_by_the_piece_before_it(small: Path) -> None:
    """山依 is as frequent as 依, which is learned first all the same."""
    pieces = next_pieces(read_tokenizer(small), ["山依"] * 5, 3, required=("山",))
    assert pieces == ["山", "依", "山依"]


def test_characters_come_by_what_they_save(small: Path) -> None:
    """A frequent pair is worth more than a rare character, and a frequent character more yet."""
    lines = ["的，的，的，月光，月光，" * 5, "依山", "依山"]
    pieces = next_pieces(read_tokenizer(small), lines, 100)
    assert pieces.index("的") < pieces.index("月光") < pieces.index("依")


def test_required_characters_come_first(small: Path, byte_level: ExtensibleTokenizer) -> None:
    for source in (read_tokenizer(small), byte_level):
        pieces = next_pieces(source, CHINESE, 40, required=("龘", "靐"))
        texts = [t for t in map(source.text, pieces) if "\ufffd" not in t]
        assert texts[:2] == ["龘", "靐"]
        check(source, pieces, [*CHINESE[:3], "龘靐" * 50])
        assert next_pieces(source, CHINESE, 6, required=("龘", "靐")) == pieces[:6]
        with pytest.raises(DataError, match=r"asks for 2 new characters, .* 1 has no room"):
            next_pieces(source, CHINESE, 1, required=("龘", "靐"))


def test_coverage_leaves_rare_characters_to_bytes(small: Path) -> None:
    source = read_tokenizer(small)
    lines = ["月光" * 100, "依依"]
    options = {"scripts": None, "required": (), "max_length": 16}
    assert "依" in learn(source, lines, 50, coverage=1.0, **options)
    assert "依" not in learn(source, lines, 50, coverage=0.99, **options)


def test_a_poor_text_gives_what_it_has(small: Path) -> None:
    """What occurs once is not learned."""
    pieces = next_pieces(read_tokenizer(small), ["月光月光月光依山"], 1000)
    assert pieces == ["光", "月", "月光", "月光月光"]


def test_no_piece_holds_a_symbol(small: Path, byte_level: ExtensibleTokenizer) -> None:
    """A symbol is cut out of the text before anything could grow around it."""
    for source in (read_tokenizer(small), byte_level):
        symbols = ["葡萄", "床前"]
        marked = extend(source, [], symbols=list(map(source.spell, symbols))).tokenizer
        pieces = next_pieces(marked, CHINESE, 250)
        assert source.spell("夜光杯") in pieces
        assert not any(symbol in source.text(piece) for piece in pieces for symbol in symbols)


def test_no_piece_holds_a_part_of_a_character(byte_level: ExtensibleTokenizer) -> None:
    """But for the parts that lead to a character; others, too rare for pieces, end the word."""
    lines = ["葡萄月光" * 20, *(f"葡{chr(0x4E00 + number)}光" for number in range(200))]
    pieces = learn(byte_level, lines, 100, scripts=None, required=(), coverage=0.7, max_length=16)
    texts = list(map(byte_level.text, pieces))
    assert "葡萄" in texts
    assert all("\ufffd" not in text or not text.strip("\ufffd") for text in texts)


def test_real_chinese(llama2: Path, corpora: dict[str, list[str]]) -> None:
    """Two thirds of the tokens with 1,200 pieces, fewer than with the characters first and merges
    after them; English and code keep every id."""
    source = read_tokenizer(llama2)
    lines = [line for text in corpora["zh"][:80] for line in text.splitlines() if len(line) > 9]
    pieces = next_pieces(source, lines, 1200, "Han")
    extended = extend(source, pieces, on_unreachable="error").tokenizer
    other = [*corpora["en"][:40], *corpora["code"][:40]]
    assert extended.encode(other) == source.encode(other)
    held_out = corpora["zh"][120:]
    assert tokens(extended, held_out) < 0.7 * tokens(source, held_out)
    counts = Counter("".join(lines))
    frequent = [c for c, _ in counts.most_common() if c in set("".join(pieces))]
    known = set(source.pieces())
    first = [c for c in frequent if c not in known][:1200]
    rest = [piece for piece in pieces if len(piece) > 1][: 1200 - len(first)]
    characters_first = extend(source, [*first, *rest]).tokenizer
    assert tokens(extended, held_out) <= tokens(characters_first, held_out)


SCRIPT = """
import sys
from pathlib import Path
from pydoc_data import topics
from colossal_llama.tokenizer.continued_bpe import learn
from colossal_llama.tokenizer.directory import read_tokenizer

lines = [line for name in sorted(topics.topics) for line in topics.topics[name].splitlines()]
pieces = learn(read_tokenizer(Path(sys.argv[1])), lines, 500, scripts=None, required=(),
               coverage=1.0, max_length=16)
sys.stdout.buffer.write("\\n".join(pieces).encode())
"""


def test_neither_threads_nor_hashing_change_the_list(small: Path) -> None:
    found = set()
    for threads, seed in (("1", "1"), ("3", "2")):
        variables = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": seed}
        found.add(
            subprocess.run(
                [sys.executable, "-c", SCRIPT, str(small)],
                check=True,
                capture_output=True,
                env=variables,
            ).stdout
        )
    assert len(found) == 1
    assert len(found.pop().splitlines()) == 500
