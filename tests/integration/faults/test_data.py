"""Damaged data in the midst of a run, and runs that go on with other processes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from colossal_llama.dataset.sampler import GlobalSampler
from tests.integration.faults.lab import (
    AUTO,
    FULL_LENGTH,
    LAST,
    Lab,
    checkpoints,
    equals,
    metrics,
    one_error,
    survivors,
)


def damage_row(part: Path, row: int) -> Path:
    """Writes a part anew with a record batch for each row, one of them damaged."""
    (path,) = part.glob("*.arrow")
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
        table = stream.read_all()
    with pa.OSFile(str(path) + ".new", "w") as sink, pa.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table, max_chunksize=1)
    os.replace(str(path) + ".new", path)
    with pa.memory_map(str(path)) as source:
        begin = source.read_buffer(1).address
        source.seek(0)
        batch = [batch for batch in pa.ipc.open_stream(source) if batch.num_rows][row]
        place = batch["labels"].buffers()[1].address - begin
    with path.open("r+b") as file:
        file.seek(place)
        file.write((1 << 28).to_bytes(8, "little"))  # where the labels begin and end
    return path


def test_one_rank_meets_damaged_data(lab: Lab, straight: Path, tmp_path: Path) -> None:
    data = shutil.copytree(lab.world.pretrain, tmp_path / "data")
    manifest = json.loads((data / "dataset_manifest.json").read_text())
    rows = [part["rows"] for part in manifest["parts"].values()]
    batch = GlobalSampler([rows], seed=42, batch_size=4).batch(8)
    part, row = 0, batch[3]  # of the third step, the last one of rank 1
    while row >= rows[part]:
        part, row = part + 1, row - rows[part]
    path = damage_row(data / f"part-{part:05d}", row)
    flags = f"{FULL_LENGTH} --dataset {data} --verify_data off"
    one_error(lab.run(flags, tmp_path / "run"), str(path))
    assert survivors(tmp_path / "run", straight) == 2


def test_data_is_cut_while_it_is_read(lab: Lab, straight: Path, tmp_path: Path) -> None:
    """What is gone cannot be read from memory: the kernel ends the process."""
    data = shutil.copytree(lab.world.pretrain, tmp_path / "data")
    path = next((data / "part-00000").glob("*.arrow"))
    whole = path.read_bytes()
    cut = {"do": "remove", "rank": 1, "step": 3, "path": str(path)}
    flags = f"{FULL_LENGTH} --dataset {data}"
    done = lab.run(flags, tmp_path / "run", cut)
    assert all(done.codes), done
    assert survivors(tmp_path / "run", straight) == 2
    one_error(lab.run(f"{flags} {AUTO}", tmp_path / "run"), str(path), "incomplete")
    path.write_bytes(whole)
    assert lab.run(f"{flags} {AUTO}", tmp_path / "run").codes == [0, 0]
    equals(tmp_path / "run", straight, LAST)


@pytest.mark.parametrize(("ranks", "rows"), [(1, 4), (2, 2), (4, 1)])
def test_resumed_with_other_processes(
    lab: Lab, straight: Path, tmp_path: Path, ranks: int, rows: int
) -> None:
    """The same rows, weights and moments; that not all is the same to the bit is said."""
    save_dir, middle = tmp_path / "run", LAST // 2
    start = checkpoints(straight)[middle]
    flags = f"{FULL_LENGTH} --save_interval 0 --micro_batch_size {rows} --load_checkpoint {start}"
    done = lab.run(flags, save_dir, ranks=ranks)
    assert set(done.codes) == {0}, done
    warned = done.lines(f"warning: {start} was written by zero2")
    carried = "weights, the optimizer's moments and the data position are carried over"
    assert [carried in line for line in warned] == ([] if ranks == 2 else [True])
    wanted = {line["step"]: line for line in metrics(straight)}
    found = {line["step"]: line for line in metrics(save_dir)}
    assert list(found) == list(range(middle + 1, LAST + 1))
    for step in found:
        for name in ("tokens", "learning_rate"):
            assert found[step][name] == wanted[step][name]
        assert found[step]["loss"] == pytest.approx(wanted[step]["loss"], rel=1e-3), step
    states = [
        json.loads((checkpoints(run)[LAST] / "running_states.json").read_text())
        for run in (straight, save_dir)
    ]
    assert states[1] == states[0] | {"world_size": ranks, "callbacks": states[1]["callbacks"]}
