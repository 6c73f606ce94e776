"""How a tokenizer's extension changes what text becomes: same ids or not, bytes per token.

    python benchmarks/segmentation_change.py llama2 tokenizer,tokenizer-all corpus/en corpus/zh

Arguments: the old tokenizer, its extensions (comma-separated), directories or files of JSON lines.
Prints, per category of the text, how many documents have the same ids as before.
"""

from __future__ import annotations

import sys
from pathlib import Path

from colossal_llama.dataset.tokenization import load_tokenizer
from colossal_llama.evaluation.perplexity import read_texts
from colossal_llama.inference.loading import text_ids


def main() -> None:
    old, extensions, *paths = sys.argv[1:]
    names = [old, *extensions.split(",")]
    tokenizers = {name: load_tokenizer(Path(name)) for name in names}
    print(f"{'category':<10}{'tokenizer':<24}{'documents':>10}{'same ids':>10}{'bytes/token':>13}")
    for category, texts in read_texts(list(map(Path, paths))).items():
        ids = {name: [text_ids(tokenizers[name], text) for text in texts] for name in names}
        size = sum(len(text.encode("utf-8")) for text in texts)
        for name in names:
            same = sum(a == b for a, b in zip(ids[name], ids[old], strict=True))
            ratio = size / sum(map(len, ids[name]))
            print(f"{category:<10}{name:<24}{len(texts):>10}{same:>10}{ratio:>13.2f}")


if __name__ == "__main__":
    main()
