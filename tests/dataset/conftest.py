"""A small Llama-style tokenizer and real text, so that these tests need nothing beside them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

CHINESE = (
    "人工智能是计算机科学的一个分支。它研究如何让机器像人一样思考。",
    "春天来了，山上的花都开了，孩子们在田野里放风筝。",
    "北京是中华人民共和国的首都，有三千多年的建城史。",
    "水在零度结冰，在一百度沸腾，这是每个学生都知道的。",
)


@pytest.fixture(scope="session")
def english() -> list[str]:
    """Documents of a few hundred to many thousand characters."""
    return [text for _, text in sorted(topics.items())][:40]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory, english: list[str]) -> Path:
    """Byte-fallback BPE with Llama's normaliser, bos, eos and no chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "</s>"]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special + bytes_, max_token_length=8, show_progress=False
    )
    words = [word for text in english[:10] for word in text.split()]
    backend.train_from_iterator(words, trainer)
    # Bytes had to be special to be in the vocabulary; in a text they are not.
    content = json.loads(backend.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in special]
    backend = Tokenizer.from_str(json.dumps(content))
    directory = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=AddedToken("<s>", special=True, normalized=False),
        eos_token=AddedToken("</s>", special=True, normalized=False),
        unk_token=AddedToken("<unk>", special=True, normalized=False),
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Any:
    from colossal_llama.dataset.tokenization import load_tokenizer

    return load_tokenizer(tokenizer_dir)


@pytest.fixture(scope="session")
def corpora(shared_data: Path) -> dict[str, list[str]]:
    """The documents of the shared corpora: zh, en and code."""
    found = {}
    for name in ("zh", "en", "code"):
        path = shared_data / "corpora" / f"{name}.jsonl.gz"
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            found[name] = [json.loads(line)["target"] for line in stream]
    return found


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    """Writes JSON lines (or raw text where a line is a string) and returns the file."""

    def write(lines: Sequence[Any], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = [x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in lines]
        path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def pretrain_lines(english: list[str]) -> list[dict[str, str]]:
    """Two categories; every third English document has a source."""
    lines = []
    for index, text in enumerate(english):
        cut = len(text) // 3 if index % 3 == 0 else 0
        lines.append({"source": text[:cut], "target": text[cut:], "category": "en"})
    lines += [
        {"source": "", "target": text * repeat, "category": "zh"}
        for text in CHINESE
        for repeat in range(1, 9)
    ]
    return lines
