"""How long does a run wait for its first batch, and for its place in the data after a restart?

    python benchmarks/load_data.py --gigabytes 1

Writes a part of random tokens in rows of 4096 and, in a fresh process for each line, prints the
seconds from the first import of the loader to a batch of 64 rows in memory. Then the time of a
batch of 1,024 at positions of a stream of a billion rows: it has to be the same everywhere.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from colossal_llama.dataset import manifest as manifests  # noqa: E402
from colossal_llama.dataset.sampler import GlobalSampler  # noqa: E402
from colossal_llama.dataset.writer import ARROW_FILE, RowBatch, write_part  # noqa: E402
from colossal_llama.storage import sha256_file  # noqa: E402

LENGTH, ROWS_PER_BATCH = 4096, 256

FIRST_BATCH = """
import sys, time
from pathlib import Path
began = time.perf_counter()
from colossal_llama.dataset.loader import open_parts
from colossal_llama.dataset.sampler import GlobalSampler
rows = open_parts([Path(sys.argv[1])], Path(sys.argv[2]), 4096, sys.argv[3])
batch = rows.take(GlobalSampler(rows.datasets, 42, 64).batch(0))
assert len(batch) == 64
print(time.perf_counter() - began)
"""


def batches(rows: int) -> Iterator[RowBatch]:
    """Rows of random tokens."""
    generator = np.random.default_rng(0)
    for first in range(0, rows, ROWS_PER_BATCH):
        count = min(ROWS_PER_BATCH, rows - first)
        ids = generator.integers(0, 32_000, count * LENGTH, dtype=np.int32)
        offsets = np.arange(count + 1, dtype=np.int32)
        yield RowBatch(
            ids,
            ids,
            offsets * LENGTH,
            np.full(count, LENGTH, dtype=np.int32),
            offsets,
            np.zeros(count, dtype=np.int32),
        )


def write_dataset(directory: Path, tokenizer_dir: Path, gigabytes: float) -> int:
    """Writes a dataset of one part; returns its size in bytes."""
    rows = round(gigabytes * 1e9 / (8 * LENGTH))
    directory.mkdir()
    write_part(directory / "part-00000", batches(rows), ["text"])
    file = directory / "part-00000" / ARROW_FILE
    entry = manifests.ArrowFile(file.stat().st_size, sha256_file(file))
    tokens = rows * LENGTH
    manifests.Manifest(
        schema_version=manifests.SCHEMA_VERSION,
        kind="pretrain",
        tokenizer=manifests.tokenizer_identity(tokenizer_dir),
        tokenizer_backend="hf",
        max_length=LENGTH,
        seed=42,
        documents=manifests.DocumentCount(rows, rows, 0, 0),
        rejected={},
        filtered={},
        notes={},
        categories={"text": manifests.CategoryCount(rows, tokens, training_tokens=tokens)},
        padding_share=0.0,
        chat_template=None,
        settings={},
        parts={
            "part-00000": manifests.Part(
                rows, tokens, LENGTH, {"text": tokens}, {ARROW_FILE: entry}
            )
        },
    ).write(directory)
    return file.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument(
        "--tokenizer_dir",
        type=Path,
        default=ROOT.parent / "shared" / "data" / "tokenizers" / "llama2",
    )
    arguments = parser.parse_args()
    print("| part | --verify_data | first batch |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        data = Path(work) / "data"
        size = write_dataset(data, arguments.tokenizer_dir, arguments.gigabytes)
        for verify in ("off", "size", "full"):
            command = [sys.executable, "-c", FIRST_BATCH, data, arguments.tokenizer_dir, verify]
            done = subprocess.run(
                list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=True
            )
            print(f"| {size / 1e9:.2f} GB | {verify} | {float(done.stdout):.2f} s |", flush=True)
    print("\n| position in a stream of 10^9 rows | batch of 1,024 |\n|---|---|")
    sampler = GlobalSampler([[10**7] * 100], 42, 1024)
    for position in (0, 123_456_789, 7 * 10**9 + 3, 10**14):
        sampler.batch(0)
        began = time.perf_counter()
        sampler.batch(position)
        print(f"| {position:,} | {(time.perf_counter() - began) * 1e3:.2f} ms |")


if __name__ == "__main__":
    main()
