"""Full, read-only and lost directories: nothing that was saved is lost, and nothing hangs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.integration.faults.lab import (
    AUTO,
    FULL_LENGTH,
    LAST,
    Lab,
    checkpoints,
    contents,
    course,
    equals,
    one_error,
    survivors,
)


def small_disk(lab: Lab) -> tuple[Path, Path]:
    """A small disk as the ranks see it and as this process does."""
    if lab.disk_inside is None or lab.disk is None:
        pytest.skip("no right to mount a small disk here")
    for path in lab.disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return lab.disk_inside / "run", lab.disk / "run"


def fill(disk: Path) -> None:
    """Leaves nothing of a disk."""
    with (disk / "block").open("wb") as stream:
        free = os.statvfs(disk)
        os.posix_fallocate(stream.fileno(), 0, free.f_bavail * free.f_frsize)


def newest_before(step: int, mode: str) -> list[int]:
    """The last checkpoint if none can be written from the beginning of ``step`` on.

    The one before may still be on its way to the disk then.
    """
    return [step - 2, step - 1] if mode else [step - 1]


@pytest.mark.parametrize("mode", ["", "--async_save"])
def test_disk_is_full_at_any_moment_of_a_save(lab: Lab, straight: Path, mode: str) -> None:
    """A run with ``--on_save_error continue`` goes on, and its checkpoints are good or absent."""
    save_dir, seen = small_disk(lab)
    size = sum(map(len, contents(checkpoints(straight)[1]).values()))
    shares = [0, 0.01, 0.1, 0.13, 0.14, 0.15, 0.16, 0.3, 0.6, 0.9, 0.95, 1, 1.05]
    free = {str(step): int(share * size) for step, share in enumerate(shares, 2)}
    free[str(LAST)] = 3 * size
    fill = {"do": "fill_disk", "rank": 0, "path": str(save_dir.parent), "free": free}
    done = lab.run(f"--on_save_error continue {FULL_LENGTH} {mode}", save_dir, fill)
    assert done.codes == [0, 0], done
    warnings = done.lines("warning: cannot write the checkpoint: ")
    # One may be complete, and only ``latest`` could not be written.
    assert len(warnings) + len(checkpoints(seen)) >= LAST
    assert survivors(seen, straight) == LAST
    assert course(seen) == course(straight)
    assert not list(seen.glob(".*"))


@pytest.mark.parametrize("mode", ["", "--async_save"])
def test_full_disk_ends_a_run_in_good_order(lab: Lab, straight: Path, mode: str) -> None:
    save_dir, seen = small_disk(lab)
    fill = {"do": "fill_disk", "rank": 0, "path": str(save_dir.parent), "free": {"3": 500_000}}
    done = lab.run(f"{FULL_LENGTH} {mode}", save_dir, fill)
    one_error(done, "cannot write the checkpoint", "No space left on device")
    assert survivors(seen, straight) in newest_before(3, mode)
    assert not list(seen.glob(".*"))
    (seen.parent / "block").unlink()
    assert lab.run(f"{AUTO} {mode}", save_dir).codes == [0, 0]
    equals(seen, straight, 8)


def test_one_machine_sees_an_old_directory(lab: Lab, straight: Path, tmp_path: Path) -> None:
    """All ranks resume from the same checkpoint: that which the first rank sees."""
    save_dir = tmp_path / "run"
    assert lab.run("--max_steps 3", save_dir).codes == [0, 0]
    done = lab.run(AUTO, save_dir, {"do": "see_old_directory", "rank": 1})
    assert done.codes == [0, 0], done
    equals(save_dir, straight, 8)


@pytest.mark.parametrize("plugin", ["3d --pp 2 --accumulation_steps 2", "3d --tp 2", "gemini"])
def test_one_rank_cannot_write_even_an_index(lab: Lab, tmp_path: Path, plugin: str) -> None:
    """ColossalAI writes it between two collectives."""
    limit = {"do": "limit_files", "rank": 1, "step": 2, "bytes": 200}
    done = lab.run(f"--plugin {plugin} --max_steps 2", tmp_path / "run", limit)
    one_error(done, "cannot write the checkpoint", "File too large")
    assert list(checkpoints(tmp_path / "run")) == [1]
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.parametrize("mode", ["", "--async_save"])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_cannot_write(
    lab: Lab, straight: Path, tmp_path: Path, mode: str, rank: int
) -> None:
    """Not even the tokenizer, which a library in Rust writes."""
    save_dir = tmp_path / "run"
    limit = {"do": "limit_files", "rank": rank, "step": 3, "bytes": 10_000}
    done = lab.run(f"{FULL_LENGTH} {mode}", save_dir, limit)
    one_error(done, "cannot write the checkpoint", "File too large")
    assert survivors(save_dir, straight) in newest_before(3, mode)
    assert not list(save_dir.glob(".*"))


@pytest.mark.parametrize("mode", ["", "--async_save"])
def test_last_checkpoint_has_to_be_written(
    lab: Lab, straight: Path, tmp_path: Path, mode: str
) -> None:
    save_dir = tmp_path / "run"
    limit = {"do": "limit_files", "rank": 1, "step": LAST - 1, "bytes": 200_000}
    done = lab.run(f"{FULL_LENGTH} {mode} --on_save_error continue", save_dir, limit)
    one_error(done, "cannot write the checkpoint", "File too large")
    assert done.lines("warning: cannot write")
    assert course(save_dir) == course(straight)
    assert survivors(save_dir, straight) in newest_before(LAST - 1, mode)


@pytest.mark.parametrize("place", ["under a file", "in /proc", "read-only disk", "full disk"])
def test_save_dir_that_cannot_be_written(lab: Lab, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    by_name = {"under a file": tmp_path / "file", "in /proc": Path("/proc")}
    if place == "full disk":
        run, seen = small_disk(lab)
        by_name[place] = run.parent
        fill(seen.parent)
    elif place == "read-only disk":
        by_name[place] = lab.read_only or pytest.skip("no right to mount a disk here")
    save_dir = by_name[place] / "runs" / "first"
    done = lab.run("", save_dir)
    one_error(done, f"--save_dir {save_dir}: cannot write to {by_name[place]}: ")
    assert not done.lines("loading ")


def test_save_dir_that_is_missing_is_not_made_for_nothing(lab: Lab, tmp_path: Path) -> None:
    save_dir = tmp_path / "a" / "b"
    (tmp_path / "data").mkdir()
    one_error(lab.run(f"--dataset {tmp_path / 'data'}", save_dir))
    assert not save_dir.parent.exists()


def test_tensorboard_directory_vanishes(lab: Lab, straight: Path, tmp_path: Path) -> None:
    save_dir = tmp_path / "run"
    vanish = {"do": "remove", "rank": 0, "step": 3, "path": str(save_dir / "tensorboard")}
    done = lab.run("", save_dir, vanish)
    assert done.codes == [0, 0], done
    assert len(done.lines("warning: tensorboard")) == 1, done
    equals(save_dir, straight, 8)


def test_tensorboard_directory_cannot_be_made(lab: Lab, straight: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = lab.run(f"--tensorboard_dir {tmp_path}/file/x --max_steps 3", tmp_path / "run")
    assert done.codes == [0, 0], done
    assert len(done.lines("warning: tensorboard")) == 1, done
    equals(tmp_path / "run", straight, 3)
