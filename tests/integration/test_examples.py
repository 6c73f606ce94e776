"""The example scripts run as they are, once their variables are set."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.integration.conftest import ROOT, World, call


@pytest.mark.parametrize(
    ("script", "data"), [("train.example.sh", "pretrain"), ("train_sft.example.sh", "sft")]
)
def test_example_script(world: World, tmp_path: Path, script: str, data: str) -> None:
    # A step of the script for conversations takes more rows than a part of the world has.
    part = world.sft if data == "sft" else world.pretrain / "part-00000"
    values = {
        "PROJECT_NAME": "example",
        "PARENT_SAVE_DIR": tmp_path / "save",
        "PARENT_TENSORBOARD_DIR": tmp_path / "tensorboard",
        "PARENT_CONFIG_FILE": tmp_path / "config",
        "PRETRAINED_MODEL_PATH": world.model,
    }
    text = (ROOT / script).read_text(encoding="utf-8")
    for name, value in values.items():
        text, count = re.subn(f'^{name}=""$', f'{name}="{value}"', text, flags=re.MULTILINE)
        assert count == 1, f"{script} does not have the variable {name}"
    text = text.replace("PATH_TO_DATASET/part-00000", str(part))
    text = text.replace("NPROC_PER_NODE=8", "NPROC_PER_NODE=2")
    copy = tmp_path / script.replace(".example", "")
    copy.write_text(text, encoding="utf-8")
    (tmp_path / "hostfile").write_text("127.0.0.1\n", encoding="utf-8")
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")

    done = call(["bash", str(copy)], cwd=tmp_path)

    assert "Traceback" not in done.stderr, "processes did not end cleanly"
    assert "Exception ignored" not in done.stderr
    (save_dir,) = (tmp_path / "save").iterdir()
    latest = save_dir / (save_dir / "latest").read_text(encoding="utf-8").strip()
    AutoModelForCausalLM.from_pretrained(latest / "modeling")
    assert list((tmp_path / "tensorboard" / save_dir.name).glob("events.*"))
    assert (tmp_path / "config" / f"{save_dir.name}.json").is_file()
