"""The order of a recipe's stages: what is skipped, resumed, started, and refused beforehand.

No model is trained here: a stand-in for ``train`` leaves what a training leaves.
``tests/integration/test_recipe.py`` has the real one.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from colossal_llama import command, storage
from colossal_llama.errors import DataError, UsageError
from colossal_llama.runtime.distributed import distributed
from colossal_llama.training import save_dir, stages
from colossal_llama.training.arguments import TrainOptions
from colossal_llama.training.stages import run_recipe
from colossal_llama.training.state import STATE_FILE, RunningState

STOPPED = 75
RECIPE = """
plugin: zero2
dataset: [FOLDER/data]
stages:
  - {name: embeddings, lr: 0.1}
  - {name: knowledge, lr: 0.2}
  - {name: chat, lr: 0.3}
"""


class Rows:
    """What stands for opened data: ten rows."""

    def __init__(self, paths: list[Path]) -> None:
        self.manifest = SimpleNamespace(kind="pretrain")
        self.files = [SimpleNamespace(path=path / "rows.arrow") for path in paths]
        self.fingerprints = [str(path) for path in paths]

    def __len__(self) -> int:
        return 10


@dataclass
class Trainer:
    """Stands for ``train``: leaves checkpoints, and stops early at the calls in ``stops``."""

    stops: dict[int, Callable[[], int]] = field(default_factory=dict)
    calls: list[TrainOptions] = field(default_factory=list)

    def __call__(self, options: TrainOptions, started: float, *, more_follows: bool) -> int:
        assert 0 <= time.monotonic() - started < 60
        assert more_follows == (options.save_dir.name != "03-chat")
        self.calls.append(options)
        storage.write_json(options.save_dir / "config.json", command.as_dict(options))
        stop = self.stops.get(len(self.calls))
        finished = stop is None
        checkpoint = options.save_dir / f"epoch-0_step-{20 if finished else 10}"
        (checkpoint / "modeling").mkdir(parents=True)
        state = RunningState(step=20 if finished else 10, finished=finished)
        storage.write_json(checkpoint / STATE_FILE, dataclasses.asdict(state))
        return 0 if stop is None else stop()

    def loaded(self) -> list[tuple[str, str | None]]:
        """For each call the stage and what it began from, below the recipe's directory."""
        return [
            (
                options.save_dir.name,
                options.load_checkpoint and options.load_checkpoint.split("/runs/")[1],
            )
            for options in self.calls
        ]


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """One process group for all tests: starting it takes longer than they do."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        with distributed(seed=0):
            yield


@pytest.fixture
def recipe(paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe's file beside its runs."""
    monkeypatch.setattr(stages, "open_parts", lambda paths, *_: Rows(paths))
    path = paths["model"].parent / "recipe.yaml"
    text = RECIPE.replace("FOLDER", str(path.parent))
    path.write_text(text, encoding="utf-8")
    return path


def run(recipe: Path, train: Callable[[TrainOptions, float], int], *flags: str) -> int:
    folder = recipe.parent
    own = ["--pretrained", str(folder / "model"), "--save_dir", str(folder / "runs")]
    return run_recipe(recipe, train, ["--config", str(recipe), *own, *flags])


def problems(recipe: Path, *flags: str) -> list[str]:
    train = Trainer()
    with pytest.raises(UsageError) as caught:
        run(recipe, train, *flags)
    assert not train.calls
    return caught.value.problems


def edit(recipe: Path, old: str, new: str) -> None:
    text = recipe.read_text(encoding="utf-8")
    assert old in text
    recipe.write_text(text.replace(old, new), encoding="utf-8")


def fail() -> int:
    raise DataError("killed")


def test_each_stage_starts_from_the_weights_of_the_one_before(recipe: Path) -> None:
    train = Trainer()
    assert run(recipe, train) == 0
    assert train.loaded() == [
        ("01-embeddings", None),
        ("02-knowledge", "01-embeddings/epoch-0_step-20/modeling"),
        ("03-chat", "02-knowledge/epoch-0_step-20/modeling"),
    ]
    assert [options.lr for options in train.calls] == [0.1, 0.2, 0.3]


def test_a_stage_that_stops_early_stops_the_recipe_with_its_code(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = Trainer({2: lambda: STOPPED})
    assert run(recipe, train) == STOPPED
    assert len(train.calls) == 2
    assert "stage 2 of 3, 02-knowledge: stopped; the same command" in capsys.readouterr().err


@pytest.mark.parametrize("stop", [lambda: STOPPED, fail])
def test_the_same_command_goes_on_where_it_stopped(
    recipe: Path, stop: Callable[[], int], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        run(recipe, Trainer({2: stop}))
    except DataError:
        assert stop is fail
    capsys.readouterr()
    train = Trainer()
    assert run(recipe, train) == 0
    assert train.loaded() == [
        ("02-knowledge", "02-knowledge/epoch-0_step-10"),
        ("03-chat", "02-knowledge/epoch-0_step-20/modeling"),
    ]
    said = capsys.readouterr().err
    assert "stage 1 of 3, 01-embeddings: finished, skipped" in said
    assert "stage 2 of 3, 02-knowledge: goes on from" in said
    assert "changed" not in said
    assert "all 3 stages are finished" in said


def test_a_finished_recipe_trains_nothing(recipe: Path) -> None:
    assert run(recipe, Trainer()) == 0
    train = Trainer()
    assert run(recipe, train) == 0
    assert not train.calls


def test_a_stage_killed_before_its_first_checkpoint_starts_again(recipe: Path) -> None:
    run(recipe, Trainer({2: lambda: STOPPED}))
    shutil.rmtree(recipe.parent / "runs" / "02-knowledge" / "epoch-0_step-10")
    train = Trainer()
    assert run(recipe, train) == 0
    assert train.loaded()[0] == ("02-knowledge", "01-embeddings/epoch-0_step-20/modeling")


def test_the_problems_of_all_stages_are_told_at_once(recipe: Path) -> None:
    edit(recipe, "lr: 0.2", "lr: -1")
    edit(recipe, "lr: 0.3", "dataset: [no-data], micro_batch_size: 0")
    found = problems(recipe, "--pretrained", "no-model")
    assert len(found) == 4, found
    for words in (
        ("02-knowledge: ", "--lr"),
        ("03-chat: ", "no-data"),
        ("03-chat: ", "--micro_batch_size"),
        ("--pretrained no-model",),
    ):
        assert sum(all(word in problem for word in words) for problem in found) == 1, words
    (common,) = [problem for problem in found if "no-model" in problem]
    assert common.startswith("--pretrained"), "said once, not for each stage"
    assert not (recipe.parent / "runs").exists()


def test_data_that_does_not_fit_is_found_before_the_first_stage(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = itertools.count()  # each stage has one of its own

    def refuse(paths: list[Path], *_: object) -> None:
        raise DataError(f"{paths[0]}/part-{next(parts)}: another tokenizer")

    monkeypatch.setattr(stages, "open_parts", refuse)
    found = problems(recipe)
    assert len(found) == 3
    assert found[2].startswith("03-chat: ")
    assert "another tokenizer" in found[2]


def test_what_is_wrong_with_all_stages_is_told_once(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise UsageError(["--freeze modle.*: no parameter has such a name"])

    monkeypatch.setattr(stages, "check_names", refuse)
    assert problems(recipe) == ["--freeze modle.*: no parameter has such a name"]


def test_too_little_data_is_found_before_the_first_stage(recipe: Path) -> None:
    edit(recipe, "lr: 0.3", "micro_batch_size: 11, max_steps: 5")
    (found,) = problems(recipe)
    assert found.startswith("03-chat: --dataset has 10 rows, fewer than the 11 of one step")


def test_rows_to_evaluate_on_that_are_trained_on_are_found_before_the_first_stage(
    recipe: Path,
) -> None:
    for name in ("held-out", "data-2"):
        (recipe.parent / name).mkdir()
    path = recipe.parent / "data-2"
    edit(recipe, "lr: 0.2", f"dataset: [{path}], eval_dataset: [{path}]")
    edit(recipe, "lr: 0.3", f"dataset: [{path}], eval_dataset: [{recipe.parent / 'held-out'}]")
    (found,) = problems(recipe)
    assert found.startswith("02-knowledge: --eval_dataset")
    assert "would be trained on" in found


def test_data_of_a_finished_stage_may_be_gone(recipe: Path) -> None:
    data = recipe.parent / "old-data"
    data.mkdir()
    edit(recipe, "lr: 0.1", f"lr: 0.1, dataset: [{data}]")
    assert run(recipe, Trainer({2: lambda: STOPPED})) == STOPPED
    data.rmdir()
    assert run(recipe, Trainer()) == 0


def test_changed_settings_of_a_finished_stage_are_refused(recipe: Path) -> None:
    run(recipe, Trainer({2: lambda: STOPPED}))
    edit(recipe, "lr: 0.1", "lr: 0.15")
    (found,) = problems(recipe)
    for word in ("runs/01-embeddings (lr 0.1 -> 0.15);", "--keep_finished", "remove"):
        assert word in found
    train = Trainer()
    assert run(recipe, train, "--keep_finished") == 0
    assert [options.save_dir.name for options in train.calls] == ["02-knowledge", "03-chat"]


def test_changed_settings_of_a_begun_stage_are_said(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(recipe, Trainer({2: lambda: STOPPED}))
    edit(recipe, "lr: 0.2", "lr: 0.25")
    assert run(recipe, Trainer()) == 0
    assert "with changed settings: lr 0.2 -> 0.25" in capsys.readouterr().err


def test_how_a_stage_is_computed_may_change(recipe: Path) -> None:
    run(recipe, Trainer({2: lambda: STOPPED}))
    assert run(recipe, Trainer(), "--plugin", "gemini", "--save_interval", "7") == 0


def test_settings_that_do_not_matter_exist() -> None:
    names = {field.name for field in dataclasses.fields(TrainOptions)}
    assert names >= save_dir._NO_MATTER


def test_a_stage_whose_forerunner_was_removed_is_refused(recipe: Path) -> None:
    run(recipe, Trainer())
    shutil.rmtree(recipe.parent / "runs" / "01-embeddings")
    found = problems(recipe)
    assert len(found) == 2
    for name, problem in zip(("02-knowledge", "03-chat"), found, strict=True):
        assert name in problem
        assert "01-embeddings before it is not finished: remove it" in problem


def test_a_stage_that_is_not_in_the_recipe_is_refused(recipe: Path) -> None:
    run(recipe, Trainer({2: lambda: STOPPED}))
    edit(recipe, "name: knowledge", "name: replay")
    (found,) = problems(recipe)
    assert "02-knowledge is no stage of" in found
