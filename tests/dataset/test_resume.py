"""The same bytes, however many processes and machines, however often it is interrupted."""

from __future__ import annotations

import fcntl
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from colossal_llama.dataset import sources
from colossal_llama.dataset.manifest import read_manifest
from tests.dataset.preparing import (
    flags_of,
    leftovers,
    prepare,
    run_script,
    script,
    tree,
)

FLAGS = {
    "num_spliced_dataset_bins": 4,
    "validation_fraction": 0.05,
    "deduplicate": "exact",
    "max_rejected": 0.1,
    "min_characters": 40,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory, pretrain_lines) -> Path:
    """Several files, of 7 MB in all: 8 chunks; with bad lines and duplicates among them."""
    directory = tmp_path_factory.mktemp("input")
    generator = random.Random(1)
    for name in ("a", "b"):
        with (directory / f"{name}.jsonl").open("w", encoding="utf-8") as stream:
            while stream.tell() < 3_500_000:
                line = dict(generator.choice(pretrain_lines))
                words = line["target"].split(" ")
                generator.shuffle(words)
                line["target"] = " ".join(words)
                text = json.dumps(line, ensure_ascii=False)
                stream.write(text[: generator.choice([9, *[None] * 40])] + "\n")
                stream.write("\n" * generator.choice([0, 0, 1]))
    return directory


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data, tokenizer_dir) -> dict[str, bytes]:
    """What one uninterrupted process writes."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert prepare(data, tokenizer_dir, output, num_workers=1, **FLAGS) == 0
    manifest = read_manifest(output)
    assert manifest.documents.rejected > 10
    assert manifest.filtered["duplicate"] > 10
    assert manifest.filtered["length"] > 0
    return tree(output)


def test_lists_name_the_lines_of_the_files(whole):
    """Lines are counted in chunks, in which blank ones are no records."""
    lines: dict[str, list[str]] = {}
    entries = 0
    for name in ("rejected.jsonl", "excluded/duplicate.jsonl", "excluded/length.jsonl"):
        for entry in map(json.loads, whole[name].splitlines()):
            path = entry["file"]
            if path not in lines:
                lines[path] = Path(path).read_text(encoding="utf-8").split("\n")
            line = lines[path][entry["line"] - 1]
            assert entry["record"] == (line if name == "rejected.jsonl" else json.loads(line))
            entries += 1
    assert len(lines) == 2
    assert entries > 100


@pytest.mark.parametrize("workers", [2, 5])
def test_any_number_of_workers_writes_the_same_bytes(tmp_path, data, tokenizer_dir, whole, workers):
    flags = flags_of(data, tokenizer_dir, tmp_path / "out", num_workers=workers, **FLAGS)
    done = run_script(*flags, f"--data_cache_dir={tmp_path / 'cache'}")
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "out") == whole
    assert list((tmp_path / "cache").iterdir()) == []
    assert leftovers(tmp_path) == []


def run_until(condition, command: list[str], kill: signal.Signals) -> bool:
    """Starts ``command`` and kills it when ``condition`` holds; False if it ended before."""
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        while process.poll() is None:
            if condition():
                process.send_signal(kill)
                process.wait()
                return True
            time.sleep(0.002)
        assert process.returncode == 0
        return False


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=str)
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, data, tokenizer_dir, whole, kill):
    output = tmp_path / "out"
    spool, staging = tmp_path / ".out.work" / "chunks", tmp_path / ".out.staging"
    command = script(
        "pretrain", *flags_of(data, tokenizer_dir, output, num_workers=2, resume=True, **FLAGS)
    )
    # In the middle of tokenising, near its end, and while parts are written.
    moments = [
        lambda: len(list(spool.glob("*.json"))) >= 2,
        lambda: len(list(spool.glob("*.json"))) >= 6,
        lambda: (staging / "part-00000").is_dir(),
    ]
    kills = sum(run_until(moment, command, kill) for moment in moments)
    assert kills >= 2
    assert not output.exists()
    done = run_script(*command[2:])
    assert done.returncode == 0, done.stderr
    assert tree(output) == whole
    assert leftovers(tmp_path) == []


def test_no_process_outlives_a_killed_run(tmp_path, data, tokenizer_dir):
    spool = tmp_path / ".out.work" / "chunks"
    flags = flags_of(data, tokenizer_dir, tmp_path / "out", num_workers=2, **FLAGS)
    with subprocess.Popen(
        script("pretrain", *flags), stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        while not list(spool.glob("*.json")):
            assert process.poll() is None
            time.sleep(0.005)
        session = os.getsid(process.pid)
        assert len(processes_of_session(session)) >= 3
        process.kill()
    deadline = time.monotonic() + 10
    while running := processes_of_session(session):
        assert time.monotonic() < deadline, running
        time.sleep(0.05)


def processes_of_session(session: int) -> list[str]:
    """What still runs of those that a command, leader of its session, has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(number) == session and state != "Z":
            found.append(path.parent.name)
    return found


@pytest.fixture
def interrupted(tmp_path, data, tokenizer_dir) -> Path:
    """The output directory of a run that was killed after some chunks."""
    output = tmp_path / "out"
    flags = flags_of(data, tokenizer_dir, output, num_workers=1, **FLAGS)
    spool = tmp_path / ".out.work" / "chunks"
    assert run_until(
        lambda: len(list(spool.glob("*.json"))) >= 3, script("pretrain", *flags), signal.SIGKILL
    )
    return output


def test_what_an_interrupted_run_left_is_not_lost_unasked(
    interrupted, data, tokenizer_dir, whole, capsys
):
    assert prepare(data, tokenizer_dir, interrupted, **FLAGS) == 2
    assert "holds an interrupted run of this command; --resume goes on" in capsys.readouterr().err
    changed = FLAGS | {"seed": 7, "resume": True}
    assert prepare(data, tokenizer_dir, interrupted, **changed) == 2
    assert "with other settings (seed)" in capsys.readouterr().err
    assert prepare(data, tokenizer_dir, interrupted, resume=True, **FLAGS) == 0
    assert tree(interrupted) == whole


def test_starting_anew_discards_it(interrupted, data, tokenizer_dir, whole):
    assert prepare(data, tokenizer_dir, interrupted, overwrite=True, **FLAGS) == 0
    assert tree(interrupted) == whole
    assert leftovers(interrupted.parent) == []


def test_other_settings_start_anew(interrupted, data, tokenizer_dir):
    assert prepare(data, tokenizer_dir, interrupted, **FLAGS | {"seed": 7}) == 0
    assert read_manifest(interrupted).seed == 7


def test_damaged_chunks_are_done_again(interrupted, data, tokenizer_dir, whole):
    """As after a power failure: files have their length, but not their content."""
    spool = interrupted.parent / ".out.work" / "chunks"
    first, second, third = sorted(spool.glob("*.json"))[:3]
    tokens = first.with_suffix(".tokens")
    tokens.write_bytes(bytes(tokens.stat().st_size))
    second.write_text('{"lines": 3', encoding="utf-8")
    third.with_suffix(".npy").write_bytes(b"")
    assert prepare(data, tokenizer_dir, interrupted, resume=True, **FLAGS) == 0
    assert tree(interrupted) == whole


def test_a_resumed_run_that_is_complete_says_so(tmp_path, data, tokenizer_dir, whole, capsys):
    for _ in range(2):
        assert prepare(data, tokenizer_dir, tmp_path / "out", resume=True, **FLAGS) == 0
        (tmp_path / ".out.work").mkdir(exist_ok=True)  # as if killed before it was removed
    assert "out is complete" in capsys.readouterr().out
    assert prepare(data, tokenizer_dir, tmp_path / "out", resume=True, **FLAGS) == 0
    assert tree(tmp_path / "out") == whole
    assert leftovers(tmp_path) == []


def test_parts_of_unknown_origin_are_not_taken_over(tmp_path, data, tokenizer_dir, whole):
    """The temporary files are gone, from a scratch disk for one, but staged parts are there."""
    for name in ("part-00000", "part-00077", "excluded"):
        (tmp_path / ".out.staging" / name).mkdir(parents=True)
        (tmp_path / ".out.staging" / name / "old").write_text("old", encoding="utf-8")
    assert prepare(data, tokenizer_dir, tmp_path / "out", **FLAGS) == 0
    assert tree(tmp_path / "out") == whole


def test_an_output_that_is_a_link_is_written_where_it_leads(tmp_path, data, tokenizer_dir, whole):
    (tmp_path / "disk" / "data").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "data")
    assert prepare(data, tokenizer_dir, tmp_path / "out", **FLAGS) == 0
    assert (tmp_path / "out").is_symlink()
    assert tree(tmp_path / "disk" / "data") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]


def test_a_changed_input_is_noticed(interrupted, data, tokenizer_dir, tmp_path, capsys):
    copy = shutil.copytree(data, tmp_path / "copy")
    text = (copy / "a.jsonl").read_bytes()
    (copy / "a.jsonl").write_bytes(text[:-20] + text[-20:].replace(b"}", b" "))
    assert prepare(copy, tokenizer_dir, interrupted, resume=True, **FLAGS) == 2
    assert "with other settings (inputs)" in capsys.readouterr().err


@pytest.mark.parametrize("order", [[1, 2, 3, 1, 2, 3], [3, 1, 2, 2, 1, 3]])
def test_machines_share_the_work_in_any_order(tmp_path, data, tokenizer_dir, whole, order, capsys):
    for share in order:
        flags = FLAGS | {"num_workers": 1, "shard": f"{share}/3"}
        assert prepare(data, tokenizer_dir, tmp_path / "out", **flags) == 0
    assert tree(tmp_path / "out") == whole
    assert leftovers(tmp_path) == []
    printed = capsys.readouterr().out
    assert f"share {order[0]} of 3 is tokenised; still to come" in printed
    assert prepare(data, tokenizer_dir, tmp_path / "out", **FLAGS, shard="1/3") == 0
    assert "out is complete" in capsys.readouterr().out


def test_machines_work_at_the_same_time(tmp_path, data, tokenizer_dir, whole):
    commands = [
        script(
            "pretrain",
            *flags_of(data, tokenizer_dir, tmp_path / "out", num_workers=1, shard=shard, **FLAGS),
        )
        for shard in ("1/2", "2/2")
    ]
    for _ in range(2):
        running = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
        assert [process.wait() for process in running] == [0, 0]
    assert tree(tmp_path / "out") == whole
    assert leftovers(tmp_path) == []


def test_whichever_machine_comes_last_completes(tmp_path, data, tokenizer_dir, whole):
    """Both are done but for the manifest; one holds the lock for a while, then gives up."""
    for share in ("1/2", "2/2"):
        flags = FLAGS | {"num_workers": 1, "shard": share}
        assert prepare(data, tokenizer_dir, tmp_path / "out", **flags) == 0
    command = script(
        "pretrain", *flags_of(data, tokenizer_dir, tmp_path / "out", shard="1/2", **FLAGS)
    )
    with (tmp_path / ".out.work" / "completion.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            time.sleep(4)
            assert process.poll() is None
            fcntl.flock(lock, fcntl.LOCK_UN)
    assert process.returncode == 0
    assert tree(tmp_path / "out") == whole


@pytest.mark.parametrize(("held", "shard"), [(fcntl.LOCK_SH, None), (fcntl.LOCK_EX, "1/2")])
def test_shares_and_whole_runs_exclude_each_other(
    tmp_path, data, tokenizer_dir, capsys, held, shard
):
    """Another directory for temporary files does not make it another output."""
    with (tmp_path / ".out.lock").open("a") as lock:
        fcntl.flock(lock, held)
        flags = FLAGS | {"data_cache_dir": tmp_path / "cache"} | ({"shard": shard} if shard else {})
        assert prepare(data, tokenizer_dir, tmp_path / "out", **flags) == 2
        assert "another process is at work there (.out.lock)" in capsys.readouterr().err
        assert not (tmp_path / "cache").exists()
        assert not (tmp_path / ".out.staging").exists()
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert prepare(data, tokenizer_dir, tmp_path / "out", **FLAGS, shard="1/2") == 0


def test_two_runs_do_not_write_one_output(tmp_path, data, tokenizer_dir, capsys):
    spool = tmp_path / ".out.work" / "chunks"
    flags = flags_of(data, tokenizer_dir, tmp_path / "out", num_workers=1, **FLAGS)
    with subprocess.Popen(
        script("pretrain", *flags), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while not list(spool.glob("*.json")):
            assert process.poll() is None
            time.sleep(0.01)
        assert prepare(data, tokenizer_dir, tmp_path / "out", overwrite=True, **FLAGS) == 2
        assert "another process is at work there" in capsys.readouterr().err
    assert process.returncode == 0


@pytest.mark.parametrize("limit", [200_000, 3_000_000])
def test_a_full_disk_gives_one_line_and_no_output(tmp_path, data, tokenizer_dir, whole, limit):
    """A limit on the size of files stands for the disk: tokens, then parts do not fit."""
    flags = flags_of(
        data, tokenizer_dir, tmp_path / "out", **FLAGS | {"num_spliced_dataset_bins": 1}
    )

    def little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    done = run_script(*flags, preexec_fn=little_room)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert f"{tmp_path / 'out'} and" in errors[0]
    assert errors[0].endswith(
        "File too large; what is done is kept: make room there, and give --resume"
    )
    assert not (tmp_path / "out").exists()
    # With room, it goes on.
    assert (
        prepare(
            data,
            tokenizer_dir,
            tmp_path / "out",
            resume=True,
            **FLAGS | {"num_spliced_dataset_bins": 1},
        )
        == 0
    )


def test_a_worker_that_is_killed_is_an_error_of_one_line(tmp_path, data, tokenizer_dir):
    flags = flags_of(data, tokenizer_dir, tmp_path / "out", num_workers=2, **FLAGS)
    spool = tmp_path / ".out.work" / "chunks"
    with subprocess.Popen(
        script("pretrain", *flags), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        while not list(spool.glob("*.json")):
            assert process.poll() is None
            time.sleep(0.005)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        # The last two are workers; the first is Python's tracker of resources.
        os.kill(int(children[-1]), signal.SIGKILL)
        errors = process.stderr.read()
    assert process.returncode == 2, errors
    assert "error: a worker process was killed" in errors
    assert "Traceback" not in errors


def test_chunks_are_small_enough_for_these_tests(data):
    assert len(sources.divide(sources.input_files([data]))) >= 8
