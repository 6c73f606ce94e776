"""Checkpoints: complete, self-contained, and exact to resume from.

<save_dir>/epoch-0_step-100/
    modeling/               a Hugging Face model directory, tokenizer included
    adapter/                the LoRA adapter, if there is one, as PEFT keeps it
    optimizer/rank-00000.safetensors ...   master weights, moments, loss scale
    optimizer/rank-00000.json ...          of which weight each of them has which part
    rng/rank-00000.safetensors ...         random states
    lr_scheduler            the schedule (JSON)
    running_states.json     position in the data, layout, fingerprints
    checksums.json          XXH3 of every other file
<save_dir>/latest           the name of the newest complete checkpoint
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from colossal_llama import storage
from colossal_llama.errors import DataError, agreed
from colossal_llama.training.file_writer import FileWriter, checksum
from colossal_llama.training.optimizer_shares import (
    Pieces,
    Share,
    carry_over,
    read_pieces,
    write_shares,
)
from colossal_llama.training.optimizer_state import load_optimizer_state, optimizer_tensors
from colossal_llama.training.plugins import Layout
from colossal_llama.training.random_states import load_random_states, random_state_tensors
from colossal_llama.training.state import (
    STATE_FILE,
    RunningState,
    checkpoint_name,
    checkpoints,
    newest_checkpoint,
    step_of,
)

CHECKSUM_FILE = "checksums.json"


class SaveError(DataError):
    """A checkpoint could not be written; those from before are as they were."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"cannot write the checkpoint: {reason}")


@dataclass(frozen=True)
class CheckpointFiles:
    """Writes the checkpoints of a run, with all its processes.

    ``save_dir`` has to be a directory that every machine of the job sees.

    Args:
        export: writes what plain transformers and PEFT load, into a directory.
        shares: what the optimizer's tensors are parts of.
        group: in which processes wait for each other's files; None for the default one.
    """

    save_dir: Path
    export: Callable[[Path, FileWriter], None]
    optimizer: Any
    shares: Sequence[Share]
    schedule: Any
    layout: Layout
    group: Any = None

    def collect(self, state: RunningState, writer: FileWriter) -> None:
        """Hands everything to ``writer``; small files are written at once.

        Raises:
            SaveError: on all processes, if there is no place to write to.
        """
        temporary, rank = self._temporary(state), dist.get_rank()
        raise_on_all(_problem_of(lambda: _make_directories(temporary)) if rank == 0 else None)
        problem = _problem_of(lambda: self.export(temporary, writer))
        if self.layout.optimizer_owner == rank:
            path = _rank_file(temporary / "optimizer", rank)
            writer.write(optimizer_tensors(self.optimizer), path)
            listing = _problem_of(lambda: write_shares(self.shares, path.with_suffix(".json")))
            problem = problem or listing
        writer.write(random_state_tensors(), _rank_file(temporary / "rng", rank))
        if rank == 0 and problem is None:
            problem = _problem_of(lambda: self._write_small_files(temporary, state))
        if problem is not None and writer.error is None:
            writer.error = OSError(problem)

    def publish(self, state: RunningState, writer: FileWriter) -> Path:
        """Gives the checkpoint its name, after all processes have written their files.

        Raises:
            SaveError: on all processes, if one of them could not write.
        """
        temporary, final = self._temporary(state), self.save_dir / checkpoint_name(state)
        writer.finish()
        try:
            problem = None if writer.error is None else _reason(writer.error, writer.failed)
            raise_on_all(problem, group=self.group)
            every: list[dict[str, str]] = [{}] * dist.get_world_size()
            own = {str(p.relative_to(temporary)): sum_ for p, sum_ in writer.checksums.items()}
            dist.all_gather_object(every, own, self.group)
            written = {name: sum_ for sums in every for name, sum_ in sums.items()}
            if dist.get_rank() == 0:
                problem = _problem_of(lambda: self._publish(temporary, final, written))
            raise_on_all(problem, group=self.group)
        except SaveError:
            if dist.get_rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        return final

    def remove_leftovers(self) -> None:
        """Removes what saves that were killed left behind; for one process, before a run."""
        for path in self.save_dir.glob(".epoch-*_step-*"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.save_dir.glob(".*.tmp-*"):  # of single files: storage.atomic_file
            with suppress(OSError):
                path.unlink()

    def set_aside(self, step: int) -> list[str]:
        """Renames the checkpoints with more steps than a run begins with; for one process.

        They are of another run, or of a way that this one does not go again, and
        ``--load_checkpoint auto`` would take them for its own. Returns their new names.
        """
        later = [path for path in checkpoints(self.save_dir) if step_of(path) > step]
        names = []
        for path in later:
            numbers = itertools.count(1)
            found = (path.with_name(f"{path.name}.set-aside-{number}") for number in numbers)
            names.append(path.rename(next(new for new in found if not new.exists())).name)
        if later:
            self._point_at(newest_checkpoint(self.save_dir))
        return names

    def keep_last(self, number: int, newest: Path) -> None:
        """Of the checkpoints up to ``newest`` removes all but the last ``number``.

        For one process. Those with more steps, of a run that was gone back from, stay.
        """
        found = checkpoints(self.save_dir)
        for path in found[: found.index(newest) + 1][:-number]:
            # Renamed first: a removal that is interrupted must not leave half a checkpoint.
            removed = path.with_name(f".{path.name}.removed")
            path.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)

    def _temporary(self, state: RunningState) -> Path:
        return self.save_dir / f".{checkpoint_name(state)}.tmp"

    def _write_small_files(self, temporary: Path, state: RunningState) -> None:
        storage.write_json(temporary / "lr_scheduler", asdict(self.schedule), atomically=False)
        storage.write_json(temporary / STATE_FILE, asdict(state), atomically=False)

    def _publish(self, temporary: Path, final: Path, written: dict[str, str]) -> None:
        others = [
            path
            for path in sorted(temporary.rglob("*"))
            if path.is_file() and str(path.relative_to(temporary)) not in written
        ]
        for path in others:  # small ones
            written[str(path.relative_to(temporary))] = checksum(path)
        storage.write_json(temporary / CHECKSUM_FILE, written, atomically=False)
        storage.replace_directory(temporary, final)
        self._point_at(final)

    def _point_at(self, newest: Path | None) -> None:
        if newest is None:
            (self.save_dir / "latest").unlink(missing_ok=True)
            return
        with storage.atomic_file(self.save_dir / "latest") as pointer:
            pointer.write_text(newest.name + "\n", encoding="utf-8")


def verify(checkpoint: Path, folder: str = "") -> None:
    """Compares the files of a checkpoint with their checksums, a share on each process.

    Args:
        folder: of which the files are compared alone, such as ``modeling``.

    Raises:
        DataError: on all processes, if a file is missing or was changed.
    """
    sums = storage.read_json(checkpoint / CHECKSUM_FILE)
    if not isinstance(sums, dict):
        raise DataError(f"{checkpoint / CHECKSUM_FILE}: not a list of checksums")
    mistake = None
    names = [name for name in sorted(sums) if name.startswith(folder)]
    for name in names[dist.get_rank() :: dist.get_world_size()]:
        path = checkpoint / name
        if not path.is_file():
            mistake = f"{path}: missing; the checkpoint is incomplete, resume from another"
        elif checksum(path) != sums[name]:
            mistake = f"{path}: damaged (its checksum is another); resume from another checkpoint"
        if mistake:
            break
    raise_on_all(mistake, DataError)


def restore(checkpoint: Path, optimizer: Any, layout: Layout) -> None:
    """Restores this process's optimizer and random states, bit for bit.

    Raises:
        DataError: on all processes: a file is missing, or belongs to another layout or model.
    """

    def load() -> None:
        path = _rank_file(checkpoint / "optimizer", layout.optimizer_owner)
        load_optimizer_state(optimizer, path)
        load_random_states(_rank_file(checkpoint / "rng", dist.get_rank()))

    _on_all(load, checkpoint)


def restore_from_shares(checkpoint: Path, optimizer: Any, shares: Sequence[Share]) -> bool:
    """Restores this process's optimizer state, but no random states, from files of another layout.

    Returns:
        whether that was possible: False, on all processes, where one of them needs a weight that
        the files do not have: another size of tensor parallelism divides all of them.

    Raises:
        DataError: on all processes: a file is missing or damaged.
    """
    pieces: Pieces = {}

    def read() -> None:
        nonlocal pieces
        pieces = read_pieces(checkpoint / "optimizer")

    _on_all(read, checkpoint)
    here = all(share.weight in pieces for share in shares)
    everywhere = [True] * dist.get_world_size()
    dist.all_gather_object(everywhere, here)
    if not all(everywhere):
        return False
    _on_all(lambda: carry_over(pieces, shares, optimizer), checkpoint)
    return True


def _on_all(load: Callable[[], None], checkpoint: Path) -> None:
    mistake = None
    try:
        load()
    except DataError as error:
        mistake = str(error)
    except (OSError, SafetensorError) as error:
        mistake = f"{checkpoint}: rank {dist.get_rank()}'s state is missing or damaged: {error}"
    raise_on_all(mistake, DataError)


def raise_on_all(problem: str | None, kind: type[DataError] = SaveError, group: Any = None) -> None:
    """Raises the first of all processes' problems on all of them.

    The first process of a machine is the one that speaks, and each process has files of its own.
    """
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem, group)
    for found in filter(None, problems):
        raise agreed(kind(found))


def _make_directories(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    for name in ("modeling", "optimizer", "rng"):
        (temporary / name).mkdir(parents=True)


def _problem_of(action: Callable[[], None]) -> str | None:
    try:
        action()
    except OSError as error:
        return _reason(error)
    return None


def _reason(error: Exception, path: Path | None = None) -> str:
    """Says what could not be written, and why."""
    reason = str(error)
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror
        # Of two names the second is that of the copy.
        path = error.filename2 or error.filename or path
    return f"{path}: {reason}" if path else reason


def _rank_file(directory: Path, rank: int) -> Path:
    return directory / f"rank-{rank:05d}.safetensors"
