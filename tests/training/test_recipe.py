"""Recipes: which setting a stage ends up with, variables, and every mistake named at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from colossal_llama.command import as_dict
from colossal_llama.errors import UsageError
from colossal_llama.training.recipe import Recipe, read_recipe, recipe_path

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
variables:
  chinese: null
  english: data/en
pretrained: model
save_dir: runs
plugin: zero2
lr: 0.5
stages:
  - name: embeddings
    config: ../stages/embeddings.yaml
    dataset: [$chinese/part-00000]
  - name: chat
    lr: 2.0e-5
    dataset: ["${english}", $chinese/chat]
"""
EMBEDDINGS = """
# Comments and other values.
freeze_non_embeds_params: true
lr: 1.0e-3
dataset: [nowhere]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of recipes with a folder of stages beside it."""
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "embeddings.yaml").write_text(EMBEDDINGS, encoding="utf-8")
    (tmp_path / "recipes").mkdir()
    return tmp_path / "recipes"


def read(folder: Path, text: str, *flags: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return read_recipe(path, ["--config", str(path), *flags])


def settings(recipe: Recipe, number: int) -> dict[str, Any]:
    return as_dict(recipe.stages[number].options)


def problems(folder: Path, text: str, *flags: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        read(folder, text, *flags)
    return caught.value.problems


def test_a_stage_has_the_settings_of_the_recipe_its_file_and_its_own(folder: Path) -> None:
    recipe = read(folder, RECIPE, "--chinese", "data/zh")
    first, second = settings(recipe, 0), settings(recipe, 1)
    assert first["pretrained"] == second["pretrained"] == "model"
    assert first["plugin"] == second["plugin"] == "zero2"
    assert (first["lr"], second["lr"]) == (1e-3, 2e-5), "from the stage's file, and beside its name"
    assert (first["freeze_non_embeds_params"], second["freeze_non_embeds_params"]) == (True, False)
    assert first["dataset"] == ["data/zh/part-00000"], "beside the name, over the file"
    assert second["dataset"] == ["data/en", "data/zh/chat"]


def test_stages_have_numbered_directories(folder: Path) -> None:
    recipe = read(folder, RECIPE, "--chinese", "zh", "--tensorboard_dir", "events")
    assert [stage.name for stage in recipe.stages] == ["01-embeddings", "02-chat"]
    assert recipe.save_dir == Path("runs")
    assert settings(recipe, 1)["save_dir"] == "runs/02-chat"
    assert settings(recipe, 1)["tensorboard_dir"] == "events/02-chat"


def test_flags_override_every_stage(folder: Path) -> None:
    flags = ["--lr", "0.25", "--pretrained", "other", "--save_dir", "out", "--chinese", "zh"]
    recipe = read(folder, RECIPE, *flags, "--english", "en")
    for number in (0, 1):
        assert settings(recipe, number)["lr"] == 0.25
        assert settings(recipe, number)["pretrained"] == "other"
    assert settings(recipe, 1)["dataset"] == ["en", "zh/chat"]
    assert settings(recipe, 1)["save_dir"] == "out/02-chat"


def test_a_default_of_the_flags_overrides_nothing(folder: Path) -> None:
    recipe = read(folder, RECIPE.replace("plugin: zero2", "num_epochs: 3"), "--chinese", "zh")
    assert settings(recipe, 0)["num_epochs"] == 3
    assert settings(recipe, 0)["plugin"] == "gemini"


def test_keep_finished_is_a_flag_of_the_recipe(folder: Path) -> None:
    assert read(folder, RECIPE, "--chinese", "zh").keep_finished is False
    assert read(folder, RECIPE, "--chinese", "zh", "--keep_finished").keep_finished is True


def test_auto_is_what_a_recipe_does(folder: Path) -> None:
    recipe = read(folder, RECIPE, "--chinese", "zh", "--load_checkpoint", "auto")
    assert settings(recipe, 0)["load_checkpoint"] is None


def test_two_dollars_are_one(folder: Path) -> None:
    recipe = read(folder, RECIPE.replace("$chinese/chat", "$$chinese/a$$"), "--chinese", "zh")
    assert settings(recipe, 1)["dataset"] == ["data/en", "$chinese/a$"]


def test_help_explains_the_variables(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read(folder, RECIPE, "--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--chinese CHINESE variable of the recipe: $chinese in recipe.yaml (required)" in text
    # What every stage has is not asked for.
    assert text.partition(" ")[2].partition(" ")[2].startswith("--chinese CHINESE [--flags] Runs")
    assert "$english in recipe.yaml (default: data/en)" in text
    assert "--keep_finished" in text
    assert "Runs the stages of" in text


def test_a_variable_without_a_value_is_a_required_flag(folder: Path) -> None:
    text = RECIPE.replace("english: data/en", "english:")
    found = problems(folder, text)
    assert [problem.split(" (")[0] for problem in found] == [
        "--chinese is required",
        "--english is required",
    ]
    assert "--chines zh" in str(problems(folder, text, "--chines", "zh"))


# For each mistake: what it replaces in the recipe, by what, and words of each problem.
MISTAKES: dict[str, tuple[str, str, list[str]]] = {
    "unknown-setting": ("plugin: zero2", "plugn: zero2", ["unknown setting plugn, did you mean"]),
    "wrong-value": ("lr: 0.5", "lr: high", ["recipe.yaml: lr: could not convert"]),
    "unknown-setting-in-stage": (
        "lr: 2.0e-5",
        "lrr: 2.0e-5",
        ["recipe.yaml: stage chat: unknown setting lrr, did you mean lr?"],
    ),
    "no-such-file": (
        "stages/embeddings.yaml",
        "stages/embedings.yaml",
        ["stage embeddings: config", "No such file"],
    ),
    "unknown-variable": (
        "$chinese/chat",
        "$chinse/chat",
        ["stage chat: dataset: there is no variable chinse; did you mean $chinese?"],
    ),
    "lone-dollar": ("$chinese/chat", "cost$", ["cost$: after a $ goes a variable's name"]),
    "no-name": ("- name: chat\n    lr", "- lr", ["stage 2: needs a name"]),
    "bad-name": ("name: chat", "name: ../chat", ["stage 2: needs a name"]),
    "same-name": ("name: chat", "name: embeddings", ["another stage with the name embeddings"]),
    "config-list": ("config: ../stages/embeddings.yaml", "config: [a]", ["expected the path"]),
    "stage-is-text": ("  - name: chat\n    lr: 2.0e-5\n    dataset:", "  - chat #", ["stage 2:"]),
    "variables-list": ("variables:\n  chinese: null\n  english:", "variables: #", []),
    "variable-is-a-flag": ("english: data/en", "tp: 2", ["there is a flag --tp already"]),
    "variable-is-a-short-flag": ("english: data/en", "zero: 2", ["a flag --zero already"]),
    "variable-with-a-dash": ("english: data/en", "new-text: a", ["letters, digits and _ only"]),
    "variable-list": ("english: data/en", "english: [a]", ["expected a single value"]),
    "no-dataset": ("dataset: [\"${english}\", $chinese/chat]", "", ["chat: --dataset is required"]),
    "load-checkpoint": ("lr: 0.5", "load_checkpoint: x", ["a recipe sets it itself"]),
    "save-dir-in-stage": ("lr: 2.0e-5", "save_dir: x", ["stage chat: save_dir: stages are saved"]),
    "overwrite": ("lr: 0.5", "overwrite: true", ["overwrite: a recipe goes on"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_named_with_its_place(folder: Path, name: str) -> None:
    old, new, words = MISTAKES[name]
    assert RECIPE.count(old) == 1
    found = problems(folder, RECIPE.replace(old, new), "--chinese", "zh")
    assert len(found) == 1, found
    for word in words:
        assert word in found[0]


@pytest.mark.parametrize("stages", ["[]", "", "{name: a}", "a"])
def test_stages_are_a_list(folder: Path, stages: str) -> None:
    text = RECIPE[: RECIPE.index("stages:")] + f"stages: {stages}\n"
    (found,) = problems(folder, text, "--chinese", "zh")
    assert "stages: expected a list of stages" in found


def test_the_mistakes_of_all_stages_are_reported_together(folder: Path) -> None:
    (folder.parent / "stages" / "embeddings.yaml").write_text("lrr: 1\nsave_dir: x\ntp: a\n")
    text = RECIPE.replace("plugin", "plugn").replace("lr: 2.0e-5", "lr: fast\n    overwrite: yes")
    text = text.replace("$chinese/chat", "$zh")
    found = problems(folder, text, "--chinese", "zh")
    words = ["plugn", "save_dir", "lrr", "tp", "overwrite", "no variable zh", "lr: "]
    assert len(found) == len(words), found
    for word, problem in zip(words, found, strict=True):
        assert word in problem


def test_a_file_shared_by_two_stages_is_reported_once(folder: Path) -> None:
    (folder.parent / "stages" / "embeddings.yaml").write_text("lrr: 1\n")
    text = RECIPE.replace("lr: 2.0e-5", "config: ../stages/embeddings.yaml")
    assert len(problems(folder, text, "--chinese", "zh")) == 1


def test_a_recipe_is_told_from_a_file_of_flags(folder: Path) -> None:
    recipe, flags = folder / "recipe.yaml", folder.parent / "stages" / "embeddings.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    assert recipe_path(["--lr", "1", "--config", str(recipe)]) == recipe
    assert recipe_path([f"--config={recipe}", "--unknown"]) == recipe
    assert recipe_path(["--config", str(flags)]) is None
    assert recipe_path(["--config", "nowhere"]) is None
    assert recipe_path(["--config"]) is None
    assert recipe_path(["--help"]) is None


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "recipes").glob("*.yaml")))
def test_our_recipes_can_be_read(path: Path) -> None:
    variables = ["chinese", "english", "replay", "chat"] if path.stem == "chinese_llama2" else []
    flags = [text for name in variables for text in (f"--{name}", f"data/{name}")]
    if variables:
        flags += ["--pretrained", "model"]
    recipe = read_recipe(path, ["--config", str(path), *flags])
    for stage in recipe.stages:
        for problem in stage.options.problems():
            assert problem.endswith("not found") or "not a model directory" in problem, problem


def test_every_stage_of_ours_belongs_to_a_recipe() -> None:
    text = (ROOT / "configs" / "recipes" / "chinese_llama2.yaml").read_text(encoding="utf-8")
    for path in (ROOT / "configs" / "stages").glob("*.yaml"):
        assert f"config: ../stages/{path.name}" in text
