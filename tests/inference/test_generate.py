"""The inference command: its flags mean what they say, its mistakes are one line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from colossal_llama.cli import main
from colossal_llama.inference.generate import GenerateOptions, continuation, prompt_ids
from colossal_llama.inference.loading import load_model_and_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "def tiny_model"


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> tuple[Any, Any]:
    return load_model_and_tokenizer(tiny_model, "cpu")


def say(loaded: Any, **settings: Any) -> str:
    options = GenerateOptions(**{"model_path": Path(), "input_txt": PROMPT, **settings})
    model, tokenizer = loaded
    return continuation(model, tokenizer, options)


def test_example_script_honours_do_sample_false(tiny_model: Path, loaded: Any) -> None:
    command = [sys.executable, str(ROOT / "inference_example.py"), "--model_path", str(tiny_model)]
    command += ["--input_txt", PROMPT, "--do_sample", "False", "--max_new_tokens", "20"]
    finished = subprocess.run(command, capture_output=True, check=True, cwd="/")
    said = finished.stdout.decode("utf-8")  # as it is: a random model may say carriage return
    assert said == say(loaded, do_sample=False, max_new_tokens=20) + "\n"
    assert said.strip()


def test_without_sampling_each_token_is_the_likeliest(loaded: Any) -> None:
    import torch

    model, tokenizer = loaded
    ids = prompt_ids(tokenizer, PROMPT, chat=False)
    assert ids[0] == tokenizer.bos_token_id
    start = len(ids)
    for _ in range(12):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    whole, before = (tokenizer.decode(x, skip_special_tokens=True) for x in (ids, ids[:start]))
    assert whole == before + say(loaded, do_sample=False, max_new_tokens=12)


def test_the_seed_decides_what_is_drawn(loaded: Any) -> None:
    settings: dict[str, Any] = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 30}
    drawn = [say(loaded, seed=seed, **settings) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-3}])
def test_each_limit_narrows_the_draw_to_the_likeliest(loaded: Any, narrow: dict[str, Any]) -> None:
    wide: dict[str, Any] = {"temperature": 3.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 20}
    greedy = say(loaded, do_sample=False, max_new_tokens=20)
    assert say(loaded, seed=1, **wide) != greedy
    assert say(loaded, seed=1, **{**wide, **narrow}) == greedy


def test_the_models_own_generation_settings_do_not_leak_in(tiny_model: Path, loaded: Any) -> None:
    model, tokenizer = load_model_and_tokenizer(tiny_model, "cpu")
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.max_new_tokens = 3
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 25}
    assert say((model, tokenizer), **settings) == say(loaded, **settings)


def test_special_strings_in_a_prompt_are_text(loaded: Any) -> None:
    _, tokenizer = loaded
    ids = prompt_ids(tokenizer, "a</s>b<s>", chat=False)
    assert tokenizer.eos_token_id not in ids
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids[1:]) == "a</s>b<s>"


def test_an_answer_stops_where_the_chat_template_ends_one(tiny_model: Path) -> None:
    model, tokenizer = load_model_and_tokenizer(tiny_model, "cpu")
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{{ 'END' }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    tokenizer.chat_template = template.replace("END", "")
    greedy: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20}
    whole = tokenizer(say((model, tokenizer), **greedy), add_special_tokens=False)["input_ids"]
    end = next(token for token in whole[3:] if token not in whole[:3])
    piece = tokenizer.convert_ids_to_tokens(end)
    tokenizer.add_special_tokens({"additional_special_tokens": [piece]})
    without_end = say((model, tokenizer), **greedy)
    tokenizer.chat_template = template.replace("END", piece)
    answer = say((model, tokenizer), **greedy)
    assert answer != without_end
    assert without_end.startswith(answer)


def test_generation_stops_at_the_end_of_the_context(
    loaded: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    _, tokenizer = loaded
    assert say(loaded, max_new_tokens=1000, seed=1) is not None
    room = 128 - len(prompt_ids(tokenizer, PROMPT, chat=False))
    assert f"{room} tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    "missing", ["nowhere", "config.json", "model.safetensors", "tokenizer.json"]
)
def test_a_missing_file_is_one_line_and_exit_code_2(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    model = tmp_path / "model"
    if missing != "nowhere":
        shutil.copytree(tiny_model, model)
        for name in {missing, "tokenizer.model"} if "token" in missing else {missing}:
            (model / name).unlink()
    assert main(["inference", "--model_path", str(model), "--input_txt", "x"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert str(model) in message


def test_weights_that_do_not_fit_are_refused(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = (model / "config.json").read_text(encoding="utf-8")
    more = config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    (model / "config.json").write_text(more, encoding="utf-8")
    assert main(["inference", "--model_path", str(model), "--input_txt", "x"]) == 2
    assert "layers.2" in capsys.readouterr().err


def test_a_checkpoint_directory_points_to_its_model(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_model, tmp_path / "step-1" / "modeling")
    assert main(["inference", "--model_path", str(tmp_path / "step-1"), "--input_txt", "x"]) == 2
    assert str(tmp_path / "step-1" / "modeling") in capsys.readouterr().err


def test_a_device_that_is_not_there(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["inference", "--model_path", str(tiny_model), "--input_txt", "x"]
    for device in ("warp-drive", "cuda:99", "meta"):
        assert main([*arguments, "--device", device]) == 2
        message = capsys.readouterr().err
        assert device in message
        assert message.count("\n") == 1


def test_all_wrong_flags_are_named_together(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["--temperature", "0", "--top_k", "-1", "--top_p", "1.5", "--max_new_tokens", "0"]
    assert main(["inference", "--model_path", "m", "--input_txt", "", *wrong]) == 2
    message = capsys.readouterr().err
    for flag in ("--temperature", "--top_k", "--top_p", "--max_new_tokens", "--input_txt"):
        assert flag in message


def test_a_boolean_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["inference", "--model_path", "m", "--input_txt", "x", "--do_sample", "perhaps"]
    assert main(arguments) == 2
    assert "not true or false" in capsys.readouterr().err
