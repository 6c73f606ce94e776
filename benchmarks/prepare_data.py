"""How fast, how large and how complete is the preparation of pretraining data?

    python benchmarks/prepare_data.py --megabytes 64 640

Makes mixed Chinese, English and code text from ../shared/data/corpora (or from the demo's text
where that is absent), repeated with changes: sentences change places, words and digits change.
Then, for every size and tokenizer backend, prints

- raw MB/s: the tokenizer alone, text in memory to ids in memory, in as many processes as the
  command uses, each with its own text; nothing else is timed;
- MB/s: the whole command, from starting Python to the output's final name, and their ratio;
- tokens kept, padding, bytes on disk per token, largest memory of all processes together (PSS),
  and the largest size of temporary files against that of the output.

Last, how fast, and in how much memory, the rows of a million documents are planned: every machine
that shares the work plans all of it.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import multiprocessing
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from colossal_llama.dataset.manifest import read_manifest  # noqa: E402
from colossal_llama.dataset.tokenization import BACKENDS, text_tokenizer  # noqa: E402

SHARED = ROOT.parent / "shared" / "data"
SENTENCE = re.compile(r"(?<=[.。!?！？\n])")


def documents() -> list[dict[str, str]]:
    """The text that is repeated."""
    found = []
    for path in sorted((SHARED / "corpora").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            found += [json.loads(line) for line in stream]
    if not found:
        from colossal_llama.demo.corpus import code_passages, english_passages

        for name, passages in (("en", english_passages()), ("code", code_passages())):
            texts = ("\n\n".join(group) for group in passages)
            found += [{"source": "", "target": text, "category": name} for text in texts]
    return found


def changed(text: str, generator: random.Random) -> str:
    """The text with its sentences shuffled, and one word in twenty and most digits changed."""
    sentences = SENTENCE.split(text)
    generator.shuffle(sentences)
    words = "".join(sentences).split(" ")
    for _ in range(len(words) // 20):
        first, second = generator.randrange(len(words)), generator.randrange(len(words))
        words[first], words[second] = words[second], words[first]
    digit = str(generator.randrange(10))
    return " ".join(words).replace(str(generator.randrange(10)), digit)


def write_input(directory: Path, megabytes: float) -> int:
    """Writes .jsonl files of ``megabytes`` million bytes of text; returns the exact number."""
    original, written, repetition = documents(), 0, 0
    generator = random.Random(1)
    with contextlib.ExitStack() as stack:
        streams: dict[str, Any] = {}
        while written < megabytes * 1e6:
            for line in original:
                name = line["category"]
                if name not in streams:
                    path = directory / f"{name}.jsonl"
                    streams[name] = stack.enter_context(path.open("w", encoding="utf-8"))
                text = line["target"] if not repetition else changed(line["target"], generator)
                written += len(text.encode("utf-8"))
                streams[name].write(json.dumps({**line, "target": text}, ensure_ascii=False) + "\n")
            repetition += 1
    return written


def read_texts(directory: Path, most: float) -> list[str]:
    """Texts of all files in turn, up to ``most`` bytes."""
    texts, size = [], 0
    with contextlib.ExitStack() as stack:
        streams = [
            stack.enter_context(path.open(encoding="utf-8"))
            for path in sorted(directory.glob("*.jsonl"))
        ]
        while streams and size < most:
            for stream in list(streams):
                line = stream.readline()
                if not line:
                    streams.remove(stream)
                    continue
                texts.append(json.loads(line)["target"])
                size += len(texts[-1].encode("utf-8"))
    return texts


def raw_worker(
    backend: str, tokenizer_json: str, texts: list[str], start: Any, results: Any
) -> None:
    """Tokenises ``texts`` in batches of 512 KiB characters and reports the seconds."""
    import os

    os.environ["RAYON_NUM_THREADS"], os.environ["TOKENIZERS_PARALLELISM"] = "1", "false"
    encode = BACKENDS[backend](tokenizer_json)
    encode(["warm up"])
    batches, batch, characters = [], [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters > 1 << 19:
            batches.append(batch)
            batch, characters = [], 0
    batches.append(batch)
    start.wait()
    began = time.perf_counter()
    for batch in batches:
        encode(batch)
    results.put(time.perf_counter() - began)


def raw_speed(backend: str, tokenizer_json: str, texts: list[str], processes: int) -> float:
    """MB/s of the tokenizer alone."""
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(processes), context.Queue()
    workers = [
        context.Process(
            target=raw_worker,
            args=(backend, tokenizer_json, texts[number::processes], start, results),
        )
        for number in range(processes)
    ]
    for worker in workers:
        worker.start()
    seconds = max(results.get() for _ in workers)
    for worker in workers:
        worker.join()
    return sum(len(text.encode("utf-8")) for text in texts) / 1e6 / seconds


class Watch(threading.Thread):
    """Samples the memory of a process and its children, and the size of temporary files."""

    def __init__(self, pid: int, temporary: Path) -> None:
        super().__init__(daemon=True)
        self.process, self.temporary = psutil.Process(pid), temporary
        self.memory = self.disk = 0
        self.stopped = threading.Event()

    def run(self) -> None:
        # Looking costs time of the cores that are measured.
        while not self.stopped.wait(0.5):
            memory = 0
            with contextlib.suppress(psutil.Error):
                for process in [self.process, *self.process.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        memory += process.memory_full_info().pss
            self.memory = max(self.memory, memory)
            self.disk = max(self.disk, size_of(self.temporary))


def size_of(directory: Path) -> int:
    """Bytes of the files below a directory."""
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def run_command(data: Path, tokenizer: Path, backend: str, work: Path, processes: int) -> dict:
    """Runs the command once and measures it."""
    output = work / "out"
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, str(ROOT / "prepare_pretrain_dataset.py")]
    flags = {
        "data_input_dirs": data,
        "tokenizer_dir": tokenizer,
        "data_arrow_output_dir": output,
        "data_cache_dir": work / "cache",
        "tokenizer_backend": backend,
        "num_workers": processes,
    }
    command += [f"--{name}={value}" for name, value in flags.items()]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        watch = Watch(process.pid, work / "cache")
        watch.start()
        _, errors = process.communicate()
    seconds = time.perf_counter() - began
    watch.stopped.set()
    if process.returncode:
        raise SystemExit(errors.decode())
    manifest = read_manifest(output)
    accepted = sum(count.tokens for count in manifest.categories.values())
    written = sum(part.tokens for part in manifest.parts.values())
    size = size_of(output)
    return {
        "seconds": seconds,
        "kept": written / accepted,
        "padding": manifest.padding_share,
        "bytes_per_token": size / written,
        "memory": watch.memory,
        "temporary": watch.disk / size,
    }


def rows(arguments: argparse.Namespace, work: Path) -> Iterator[str]:
    """The lines of the table."""
    tokenizer_json = text_tokenizer(arguments.tokenizer_dir).json
    for megabytes in arguments.megabytes:
        data = work / "input"
        shutil.rmtree(data, ignore_errors=True)
        data.mkdir()
        size = write_input(data, megabytes) / 1e6
        texts = read_texts(data, min(size, 64) * 1e6)
        for backend in arguments.backends:
            raw = raw_speed(backend, tokenizer_json, texts, arguments.processes)
            found = run_command(data, arguments.tokenizer_dir, backend, work, arguments.processes)
            speed = size / found["seconds"]
            yield (
                f"| {size:.0f} MB | {backend} | {raw:.1f} | {speed:.1f} | {speed / raw:.2f} | "
                f"{found['kept']:.2%} | {found['padding']:.2%} | {found['bytes_per_token']:.2f} | "
                f"{found['memory'] / 2**20:.0f} MiB | {found['temporary']:.2f} |"
            )


def plan(count: int, results: Any) -> None:
    """Plans rows of 4096 for documents of some 1,100 tokens; reports seconds and bytes."""
    import numpy as np

    from colossal_llama.dataset.layout import Documents, LayoutOptions, plan_parts

    before = peak_memory()
    generator = np.random.default_rng(0)
    lengths = np.minimum(generator.lognormal(6.5, 1, count).astype(np.int64) + 2, 100_000)
    documents = Documents(
        names=["en", "zh"],
        lengths=lengths,
        loss_start=np.zeros(count, dtype=np.int64),
        loss_tokens=lengths,
        categories=generator.integers(0, 2, count),
        hashes=generator.integers(0, 1 << 62, count).astype(np.uint64),
        chunks=np.arange(count) // 1000,
        offsets=np.cumsum(lengths) - lengths,
    )
    began = time.perf_counter()
    plan_parts(documents, LayoutOptions("best_fit", 4096, 100, 0.001, {}, 1))
    seconds = time.perf_counter() - began
    results.put((seconds, peak_memory() - before))


def peak_memory() -> int:
    """The most memory that this process has had, in bytes (a child's ru_maxrss is its parent's)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def planning(count: int) -> str:
    """A sentence on planning ``count`` documents."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=plan, args=(count, results))
    process.start()
    seconds, size = results.get()
    process.join()
    return f"{count:,} documents are planned in {seconds:.1f} s and {size / count:.0f} bytes each"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, nargs="+", default=[64, 640])
    parser.add_argument("--backends", nargs="+", default=["gigatoken", "hf"], choices=BACKENDS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tokenizer_dir", type=Path, default=SHARED / "tokenizers" / "llama2")
    arguments = parser.parse_args()
    print(
        "| input | backend | raw MB/s | command MB/s | ratio | tokens kept | padding | "
        "bytes/token | memory | temporary/output |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as work:
        for row in rows(arguments, Path(work)):
            print(row, flush=True)
    print(f"\n{planning(1_000_000)}")


if __name__ == "__main__":
    main()
