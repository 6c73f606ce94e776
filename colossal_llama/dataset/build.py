"""From input files to parts and a manifest: what both kinds of dataset share.

1. Chunks of the input are read, checked, cleaned and tokenised, each by one worker process.
2. From the documents' lengths alone a plan of all parts is made (``layout.py``).
3. Parts are written, each by one worker process.
4. The manifest is written, and the output takes its name.

Chunks and parts that are done are not done again by a run that resumes, or by another machine.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama import command
from colossal_llama.dataset.chunk_worker import ChunkWorker
from colossal_llama.dataset.job import Job, processes
from colossal_llama.dataset.layout import LayoutOptions, Plan, plan_parts
from colossal_llama.dataset.manifest import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    VALIDATION_PART,
    CategoryCount,
    DocumentCount,
    Manifest,
    Part,
    read_manifest,
)
from colossal_llama.dataset.results import Results
from colossal_llama.dataset.selection import check_mix, parse_mix
from colossal_llama.dataset.spool import ChunkFiles
from colossal_llama.dataset.summary import summary
from colossal_llama.dataset.workers import Workers
from colossal_llama.dataset.workspace import Places, hold_completion, open_workspace
from colossal_llama.errors import ColossalLlamaError, DataError

if TYPE_CHECKING:
    import numpy as np

_DUPLICATE = "duplicate"


class RejectedError(DataError):
    """Too many records are malformed. What was tokenised is kept for ``--resume``."""


def build_dataset(job: Job) -> None:
    """Runs a job, or as much of it as this machine's share is.

    Raises:
        DataError: the input cannot be used, or an output exists.
    """
    options = job.options
    places = Places.of(
        options.data_arrow_output_dir, options.data_jsonl_output_dir, options.data_cache_dir
    )
    settings = job.settings()
    share, _ = options.share()
    if (options.resume or options.shard) and _is_complete(places, settings):
        places.discard()  # an interruption may have come when all was done but that
        print(f"{options.data_arrow_output_dir} is complete")
        return
    with open_workspace(
        places,
        settings,
        resume=options.resume,
        overwrite=options.overwrite,
        share=share if options.shard else None,
    ):
        try:
            _run(job, places, settings)
        except RejectedError:
            raise
        except FileNotFoundError:
            # Whoever completes the output takes away what another machine may be reading.
            if not (options.shard and _is_complete(places, settings)):
                raise
            places.discard()
            print(f"{options.data_arrow_output_dir} is complete")
        except KeyboardInterrupt:
            print(f"what is done is kept in {places.work}: --resume goes on", file=sys.stderr)
            raise
        except OSError as error:
            if error.errno not in command.FULL:
                raise
            raise ColossalLlamaError(
                f"{places.arrow} and {places.work}: {os.strerror(error.errno)}; what is done is "
                "kept: make room there, and give --resume"
            ) from None
        except DataError:
            if options.shard is None:
                places.discard()
            raise


def _run(job: Job, places: Places, settings: dict[str, Any]) -> None:
    share, shares = job.options.share()
    count, threads = processes(job.options, job.chunks)
    make = functools.partial(
        ChunkWorker,
        functools.partial(job.make_kind, parallel=threads > 1),
        places.spool,
        whole_texts=job.whole_texts,
        hash_texts=job.deduplicate != "none" or job.options.validation_fraction > 0,
        near_duplicates=job.deduplicate == "near",
        threads=threads,
    )
    with Workers(make, count) as workers:
        _tokenize(job, places, workers)
        missing = _missing_chunks(job, places)
        if missing:
            others = sorted({number % shares + 1 for number in missing})
            print(
                f"share {share + 1} of {shares} is tokenised; still to come: "
                f"{', '.join(map(str, others))}. Run each share again when all are"
            )
            return
        results = Results.of(places.spool, job.chunks)
        try:
            results.check_rejected(job.options.max_rejected, places.rejected)
        except DataError as error:
            raise RejectedError(str(error)) from None
        table = results.table()
        kept = _kept(job, results, table)
        if not kept.any():
            left_out = results.total("rejected") + results.total("filtered")
            why = ", ".join(f"{number} {reason}" for reason, number in left_out.items())
            raise DataError(
                f"the input holds no document that could be kept ({why or 'it is empty'}); "
                "give other input, or allow more"
            )
        absent = sorted(job.named_categories - set(results.category_names()))
        if absent:
            print(
                f"note: no document that was kept has the category {', '.join(absent)}, for which "
                f"a flag asks something; there are {', '.join(results.category_names())}",
                file=sys.stderr,
            )
        plan = _plan(job, results, table, kept)
        _write_parts(job, places, plan, workers)
        with hold_completion(places):
            _complete(job, places, settings, results, table, kept, plan, workers)


def _tokenize(job: Job, places: Places, workers: Workers) -> None:
    """Tokenises what is not done of this machine's share."""
    from tqdm import tqdm

    share, shares = job.options.share()
    own = [(n, chunk) for n, chunk in enumerate(job.chunks) if n % shares == share]
    tasks = [(n, chunk) for n, chunk in own if not ChunkFiles(places.spool, n).is_whole()]
    done = sum(chunk.size for _, chunk in own) - sum(chunk.size for _, chunk in tasks)
    total = sum(chunk.size for _, chunk in own)
    rejected = 0
    with (
        tqdm(
            total=total, initial=done, desc="tokenize", unit="B", unit_scale=True, disable=None
        ) as bar,
        _tokens_beside(bar, places.spool),
    ):
        for chunk, found in workers.run("tokenize", tasks):
            rejected += sum(found.rejected.values())
            bar.update(chunk.size)
            if rejected:
                bar.set_description(f"tokenize ({rejected} rejected)", refresh=False)


@contextlib.contextmanager
def _tokens_beside(bar: Any, spool: Path) -> Iterator[None]:
    """Shows beside a progress bar, every second, how many tokens there are.

    The bar itself only moves with a chunk, and a large compressed file is one.
    """
    ended = threading.Event()

    def show() -> None:
        while not ended.wait(1):
            size = sum(path.stat().st_size for path in spool.glob("*.tokens"))
            bar.set_postfix_str(f"{size / 4e6:,.1f}M tokens")

    thread = threading.Thread(target=show, daemon=True)
    if not bar.disable:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if thread.is_alive():
            thread.join()


def _missing_chunks(job: Job, places: Places) -> list[int]:
    return [
        number
        for number in range(len(job.chunks))
        if ChunkFiles(places.spool, number).summary() is None
    ]


def _kept(job: Job, results: Results, table: np.ndarray) -> np.ndarray:
    """Which documents are no duplicates of one before, bool [documents]."""
    import numpy as np

    from colossal_llama.dataset.cleaning.near_duplicates import first_of_each, first_of_equal

    kept = np.ones(len(table), dtype=np.bool_)
    if job.deduplicate != "none":
        kept = first_of_equal(table["hash"])
    if job.deduplicate == "near" and len(table):
        kept &= first_of_each(results.bands())
    return kept


def _plan(job: Job, results: Results, table: np.ndarray, kept: np.ndarray) -> Plan:
    options = job.options
    documents = results.documents(table, kept)
    shares = parse_mix(options.mix)
    check_mix(shares, documents.names)
    return plan_parts(
        documents,
        LayoutOptions(
            packing=job.packing,
            max_length=options.max_length,
            num_bins=options.num_spliced_dataset_bins,
            validation_fraction=options.validation_fraction,
            shares=shares,
            seed=options.seed,
        ),
    )


def _write_parts(job: Job, places: Places, plan: Plan, workers: Workers) -> None:
    """Writes what is not written of this machine's share of the parts."""
    from tqdm import tqdm

    share, shares = job.options.share()
    own = [part for number, part in enumerate(plan.parts) if number % shares == share]
    tasks = [
        (part, places.staged_arrow, places.staged_jsonl)
        for part in own
        if not places.has_whole_part(part.name)
    ]
    with tqdm(
        total=len(own), initial=len(own) - len(tasks), desc="write", unit=" parts", disable=None
    ) as bar:
        for name, part in workers.run("write_part", tasks):
            places.note_part(name, part)
            bar.update()


def _complete(
    job: Job,
    places: Places,
    settings: dict[str, Any],
    results: Results,
    table: np.ndarray,
    kept: np.ndarray,
    plan: Plan,
    workers: Workers,
) -> None:
    """Writes the manifest and gives the output its name, if all parts are written."""
    if not places.staged_arrow.is_dir():  # another machine was faster
        places.discard()
        print(f"{places.arrow} is complete")
        return
    written = {part.name: places.written_part(part.name) for part in plan.parts}
    missing = [name for name, part in written.items() if part is None]
    if missing:
        print(
            f"share {job.options.shard} of the parts is written, {len(missing)} of "
            f"{len(written)} are still to come; run the other shares again"
        )
        return
    duplicates = results.lines_of(table, ~kept)
    for _ in workers.run("write_duplicates", duplicates):
        pass
    workers.close()
    results.write_lists(places.staged_arrow, [*job.stages, _DUPLICATE])
    manifest = _manifest(job, settings, results, int((~kept).sum()), plan, written)
    manifest.write(places.staged_arrow)
    places.complete()
    print(summary(manifest, job.options.data_arrow_output_dir))


def _manifest(
    job: Job,
    settings: dict[str, Any],
    results: Results,
    duplicates: int,
    plan: Plan,
    written: dict[str, Part | None],
) -> Manifest:
    rejected, filtered = results.total("rejected"), results.total("filtered")
    if job.deduplicate != "none":
        filtered[_DUPLICATE] = duplicates
    accepted = sum(count.documents for count in plan.categories.values())
    parts = {name: part for name, part in written.items() if part is not None}
    validation = parts.pop(VALIDATION_PART, None)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        kind=job.kind,
        tokenizer=job.tokenizer,
        tokenizer_backend=job.backend,
        max_length=job.options.max_length,
        seed=job.options.seed,
        documents=DocumentCount(results.records, accepted, rejected.total(), filtered.total()),
        rejected=dict(rejected),
        filtered=dict(filtered),
        notes=dict(results.total("notes")),
        categories=plan.categories,
        padding_share=_padding_share(parts, job.options.max_length),
        chat_template=job.chat_template,
        settings=settings,
        parts=parts,
        validation=validation,
    )
    _check_conservation(manifest, plan.categories)
    return manifest


def _check_conservation(manifest: Manifest, categories: dict[str, CategoryCount]) -> None:
    """Asserts that documents and tokens add up (an invariant of ours)."""
    count = manifest.documents
    assert count.input == count.accepted + count.rejected + count.filtered, count
    tokens = sum(part.tokens for part in manifest.parts.values())
    taken = sum(c.training_tokens - c.tokens_without_loss for c in categories.values())
    assert tokens == taken, (tokens, taken)


def _padding_share(parts: dict[str, Part], max_length: int) -> float:
    room = max_length * sum(part.rows for part in parts.values())
    return round(1 - sum(part.tokens for part in parts.values()) / room, 6) if room else 0.0


def _is_complete(places: Places, settings: dict[str, Any]) -> bool:
    """Whether the output is there, made with the same settings."""
    if not (places.arrow / MANIFEST_FILE).is_file():
        return False
    return read_manifest(places.arrow).settings == settings
