"""The whole command: new rows as promised, everything old bit by bit as it was."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from colossal_llama import command
from colossal_llama.model.init_model import InitModelOptions, init_model
from colossal_llama.model.strategies import STRATEGIES
from colossal_llama.tokenizer.init_tokenizer import InitTokenizerOptions, init_tokenizer
from colossal_llama.tokenizer.sentencepiece_model import read_model

SCRIPT = Path(__file__).resolve().parents[2] / "colossal_llama" / "model" / "init_model.py"
PRESETS = SCRIPT.parent / "presets"
OLD_SIZE = 700
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def init(**flags: object) -> int:
    """The command, in this process; the exit code."""
    given = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    return command.run(InitModelOptions, init_model, given)


def extend(source: Path, tokenizer: Path, target: Path, **flags: object) -> int:
    """The usual call: a source model and an extended tokenizer give a target model."""
    return init(
        source_model_and_tokenizer_path=source,
        target_tokenizer_path=tokenizer,
        target_model_path=target,
        **flags,
    )


@pytest.fixture
def make_source(old_tokenizer: Path, tmp_path: Path) -> Callable[..., Path]:
    """Saves a random model with the old tokenizer beside it."""

    def make(
        rows: int = OLD_SIZE, dtype: str = "float32", shard_size: str = "5GB", **fields: Any
    ) -> Path:
        torch.manual_seed(1)
        preset = json.loads((PRESETS / "tiny.json").read_text(encoding="utf-8"))
        config = AutoConfig.for_model(**{**preset, "vocab_size": rows, **fields})
        model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32)
        source = tmp_path / "source"
        model.to(DTYPES[dtype]).save_pretrained(source, max_shard_size=shard_size)
        shutil.copytree(old_tokenizer, source, dirs_exist_ok=True)
        return source

    return make


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return found


def expected_row(piece: str, rows: torch.Tensor, old_tokenizer: Path) -> torch.Tensor:
    """The mean over SentencePiece's own segmentation, one row at a time, in float64."""
    model = read_model(old_tokenizer / "tokenizer.model")
    model.normalizer_spec.add_dummy_prefix = False
    ids = SentencePieceProcessor(model_proto=model.SerializeToString()).encode(piece)
    assert ids
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for key in ids:
        total += rows[key].double()
    return total / len(ids)


CASES = {
    "single file": {},
    "sharded": {"shard_size": "60KB"},
    "tied": {"tie_word_embeddings": True},
    "tied and sharded": {"tie_word_embeddings": True, "shard_size": "60KB"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "padded": {"rows": 768},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_new_rows_and_old_weights(
    case: dict[str, Any],
    make_source: Callable[..., Path],
    old_tokenizer: Path,
    new_tokenizer: Path,
    tmp_path: Path,
) -> None:
    """Defects 6 and 7: the mean without the prefix; dtype, tying and shards as they were."""
    source, target = make_source(**case), tmp_path / "target"
    assert extend(source, new_tokenizer, target) == 0
    old, new = tensors(source), tensors(target)
    pieces = [entry.piece for entry in read_model(new_tokenizer / "tokenizer.model").pieces]
    assert len(pieces) > OLD_SIZE + 7
    assert old.keys() == new.keys()
    assert ("lm_head.weight" in new) != case.get("tie_word_embeddings", False)
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
    for name, rows in new.items():
        assert rows.dtype == old[name].dtype == DTYPES[case.get("dtype", "float32")]
        if name not in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(rows, old[name])
            continue
        assert rows.shape == (len(pieces), old[name].shape[1])
        assert torch.equal(rows[:OLD_SIZE], old[name][:OLD_SIZE])
        for key in range(OLD_SIZE, len(pieces)):
            wanted = expected_row(pieces[key], old[name], old_tokenizer)
            torch.testing.assert_close(
                rows[key].double(), wanted, rtol=tolerance[rows.dtype], atol=1e-6
            )
    assert sorted(p.name for p in source.glob("*.safetensors*")) == sorted(
        p.name for p in target.glob("*.safetensors*")
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_transformers_loads_it_and_old_text_has_its_logits(
    case: dict[str, Any], make_source: Callable[..., Path], new_tokenizer: Path, tmp_path: Path
) -> None:
    source, target = make_source(**case), tmp_path / "target"
    assert extend(source, new_tokenizer, target) == 0
    old, _ = _load(source)
    new, report = _load(target)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert new.config.vocab_size == len(tokenizer) == new.get_input_embeddings().num_embeddings
    tied = new.get_input_embeddings().weight is new.get_output_embeddings().weight
    assert tied == case.get("tie_word_embeddings", False)
    ids = tokenizer("The with statement is used to wrap a block.", return_tensors="pt").input_ids
    assert ids.max() < OLD_SIZE
    with torch.no_grad():
        before, after = old(ids).logits, new(ids).logits
    assert torch.equal(before[..., :OLD_SIZE], after[..., :OLD_SIZE])
    if (target / "model.safetensors.index.json").is_file():
        index = json.loads((target / "model.safetensors.index.json").read_text(encoding="utf-8"))
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(target).values())
        assert index["weight_map"].keys() == tensors(target).keys()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_and_seeds(
    strategy: str, make_source: Callable[..., Path], new_tokenizer: Path, tmp_path: Path
) -> None:
    source = make_source(dtype="bfloat16")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        flags = {"init_strategy": strategy, "seed": seed}
        assert extend(source, new_tokenizer, tmp_path / name, **flags) == 0
    first, again, other = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b", "c")
    )
    assert first == again
    assert (first == other) == strategy.startswith("mean")
    old, new = tensors(source), tensors(tmp_path / "a")
    rows = [new[f"{name}.weight"][OLD_SIZE:] for name in ("model.embed_tokens", "lm_head")]
    assert not (rows[0] == rows[1]).all(1).any()  # two matrices, not one drawn twice
    for name, tensor in old.items():
        assert torch.equal(new[name][: len(tensor)], tensor)
        assert torch.isfinite(new[name]).all()


def test_a_tied_model_with_two_matrices_on_disk_gets_the_same_rows(
    make_source: Callable[..., Path], new_tokenizer: Path, tmp_path: Path
) -> None:
    source = make_source(tie_word_embeddings=True)
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    assert extend(source, new_tokenizer, tmp_path / "target", init_strategy="random") == 0
    new = tensors(tmp_path / "target")
    assert torch.equal(new["lm_head.weight"], new["model.embed_tokens.weight"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard_size", ["5GB", "60KB"])
def test_a_new_type(
    dtype: str,
    shard_size: str,
    make_source: Callable[..., Path],
    new_tokenizer: Path,
    tmp_path: Path,
) -> None:
    source, target = make_source(shard_size=shard_size), tmp_path / "target"
    assert extend(source, new_tokenizer, target, dtype=dtype) == 0
    old, new = tensors(source), tensors(target)
    for name, tensor in old.items():
        assert new[name].dtype == DTYPES[dtype]
        kept = OLD_SIZE if name in ("model.embed_tokens.weight", "lm_head.weight") else len(tensor)
        assert torch.equal(new[name][:kept], tensor[:kept].to(DTYPES[dtype]))
    model, _ = _load(target)
    assert model.dtype == DTYPES[dtype]
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == dtype


def test_verification_in_the_real_command(
    make_source: Callable[..., Path], new_tokenizer: Path, tmp_path: Path
) -> None:
    source, target = make_source(shard_size="60KB", dtype="bfloat16", rows=768), tmp_path / "target"
    flags = ["--source_model_and_tokenizer_path", source, "--target_model_path", target]
    flags += ["--target_tokenizer_path", new_tokenizer, "--verify", "The with statement."]
    argv = list(map(str, [sys.executable, SCRIPT, *flags]))
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "bits per byte on 19 bytes" in done.stdout
    assert "identical" in done.stdout
    assert target.is_dir()


def test_verification_of_new_text_in_a_file(
    make_source: Callable[..., Path],
    new_tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def f(): return 1\n你好世界\n", encoding="utf-8")
    assert extend(make_source(), new_tokenizer, tmp_path / "target", verify=text) == 0
    printed = capsys.readouterr().out
    assert "bits per byte on 29 bytes" in printed
    assert "1 of them new pieces" in printed
    assert "identical" not in printed


def test_a_failed_verification_leaves_nothing(
    make_source: Callable[..., Path],
    new_tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = make_source()
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    assert extend(source, new_tokenizer, tmp_path / "target", verify="Some text.") == 2
    assert "not finite" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_symbols_and_padding_of_a_real_extension(
    make_source: Callable[..., Path], old_tokenizer: Path, tmp_path: Path
) -> None:
    """init_tokenizer.py's symbols are what they read; its padding is the mean of all."""
    pieces = tmp_path / "pieces.jsonl"
    lines = ({"piece": "<h1>", "type": "user_defined"}, {"piece": "你好"})
    pieces.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    flags = ["--source_tokenizer_dir", old_tokenizer, "--expand_tokens_file", pieces]
    flags += ["--target_tokenizer_dir", tmp_path / "tokenizer", "--pad_vocab_to_multiple_of", 128]
    assert command.run(InitTokenizerOptions, init_tokenizer, list(map(str, flags))) == 0
    source, target = make_source(), tmp_path / "target"
    assert extend(source, tmp_path / "tokenizer", target) == 0
    old, new = (tensors(d)["lm_head.weight"] for d in (source, target))
    assert new.shape[0] == 768
    model = read_model(tmp_path / "tokenizer" / "tokenizer.model")
    names = {entry.piece: key for key, entry in enumerate(model.pieces)}
    for piece in ("<h1>", "你好"):
        wanted = expected_row(piece, old, old_tokenizer)
        torch.testing.assert_close(new[names[piece]].double(), wanted, rtol=1e-6, atol=1e-6)
    padding = [row for row in new[OLD_SIZE:] if torch.allclose(row, old.mean(0), atol=1e-6)]
    assert len(padding) == sum(entry.type == 5 for entry in model.pieces) > 0


def test_only_files_with_embeddings_are_rewritten(
    make_source: Callable[..., Path], new_tokenizer: Path, tmp_path: Path
) -> None:
    source, target = make_source(shard_size="60KB"), tmp_path / "target"
    assert extend(source, new_tokenizer, target) == 0
    index = json.loads((source / "model.safetensors.index.json").read_text(encoding="utf-8"))
    names = {index["weight_map"][f"{key}.weight"] for key in ("model.embed_tokens", "lm_head")}
    assert len(names) == 2
    for path in source.glob("*.safetensors"):
        same = path.read_bytes() == (target / path.name).read_bytes()
        assert same == (path.name not in names)


def test_settings_and_tokenizer_come_along(
    make_source: Callable[..., Path], new_tokenizer: Path, tmp_path: Path
) -> None:
    """Nobody copies files by hand, or edits vocab_size."""
    source, target = make_source(), tmp_path / "target"
    (source / "generation_config.json").write_text('{"temperature": 0.5}')
    assert extend(source, new_tokenizer, target) == 0
    assert (target / "generation_config.json").read_text() == '{"temperature": 0.5}'
    old, new = (json.loads((d / "config.json").read_text()) for d in (source, target))
    assert new == {**old, "vocab_size": new["vocab_size"]}
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (target / name).read_bytes() == (new_tokenizer / name).read_bytes()


def test_which_rows_are_new_is_noted_beside_the_model(
    make_source: Callable[..., Path], new_tokenizer: Path, tmp_path: Path
) -> None:
    """Training reads there what --train_new_rows_only leaves as it is."""
    source, tokenizer = make_source(), tmp_path / "tokenizer"
    shutil.copytree(new_tokenizer, tokenizer)
    for name, report in (("a", None), ("b", {"size_before": 3, "pieces_added": 7})):
        (tokenizer / "extension_report.json").unlink(missing_ok=True)
        if report is not None:
            (tokenizer / "extension_report.json").write_text(json.dumps(report))
        assert extend(source, tokenizer, tmp_path / name) == 0
        noted = json.loads((tmp_path / name / "extension_report.json").read_text())
        config = json.loads((tmp_path / name / "config.json").read_text())
        sizes = {"size_before": OLD_SIZE, "size_after": config["vocab_size"]}
        assert noted == {**(report or {}), **sizes}


def test_a_missing_generation_config_is_made(
    make_source: Callable[..., Path], new_tokenizer: Path, tmp_path: Path
) -> None:
    source, target = make_source(), tmp_path / "target"
    (source / "generation_config.json").unlink()
    assert extend(source, new_tokenizer, target) == 0
    assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == 2


def _shrink_vocabulary(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": 600}))


def _cut_weights(source: Path) -> None:
    content = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(content[:-1000])


def _pickle_weights(source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")


def _add_token(source: Path) -> None:
    (source / "added_tokens.json").write_text('{"<pad>": 700}')


def _swap_ids(source: Path) -> None:
    fast = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = fast["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (source / "tokenizer.json").write_text(json.dumps(fast), encoding="utf-8")


def _quantise(source: Path) -> None:
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(weights, source / "model.safetensors", {"format": "pt"})


def _no_tokenizer(source: Path) -> None:
    for path in source.glob("token*"):
        path.unlink()


def _no_deviation(source: Path) -> None:
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["initializer_range"] = None
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")


MISTAKES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no directory": (shutil.rmtree, ("no such model directory",)),
    "no config": (lambda source: (source / "config.json").unlink(), ("config.json",)),
    "other vocab_size": (_shrink_vocabulary, ("700 rows", "vocab_size 600")),
    "no deviation": (_no_deviation, ("config.json: initializer_range is None",)),
    "cut weights": (_cut_weights, ("model.safetensors", "not a complete")),
    "pickles": (_pickle_weights, (".bin", "convert-checkpoint")),
    "no weights": (lambda source: (source / "model.safetensors").unlink(), ("no weights",)),
    "quantised": (_quantise, ("lm_head.weight is a F8_E4M3 tensor", "not quantised")),
    "tokenizer too large": (_add_token, ("701 ids", "700 rows")),
    "other tokenizer": (_swap_ids, ("not an extension", "'a'", "'b'")),
    "no tokenizer": (_no_tokenizer, ("no tokenizer here",)),
}


@pytest.mark.parametrize(("mistake", "complaints"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told_in_one_line(
    mistake: Callable[[Path], object],
    complaints: tuple[str, ...],
    make_source: Callable[..., Path],
    new_tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = make_source()
    mistake(source)
    capsys.readouterr()
    assert extend(source, new_tokenizer, tmp_path / "target") == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert str(source) in message
    for complaint in complaints:
        assert complaint in message
    assert {path.name for path in tmp_path.iterdir()} <= {"source"}


def test_a_missing_shard_is_named(
    make_source: Callable[..., Path],
    new_tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = make_source(shard_size="60KB")
    lost = sorted(source.glob("*.safetensors"))[1]
    lost.unlink()
    assert extend(source, new_tokenizer, tmp_path / "target") == 2
    assert str(lost) in capsys.readouterr().err
    assert not (tmp_path / "target").exists()


def test_the_real_command(
    make_source: Callable[..., Path], old_tokenizer: Path, new_tokenizer: Path, tmp_path: Path
) -> None:
    """The file runs as users run it; a wrong tokenizer ends it with 2 and leaves nothing."""
    source = make_source()
    given = [sys.executable, SCRIPT, "--source_model_and_tokenizer_path", source]
    given += ["--target_model_path", tmp_path / "target"]
    wrong = tmp_path / "wrong"
    shutil.copytree(old_tokenizer, wrong)
    _swap_ids(wrong)
    for tokenizer, code in ((wrong, 2), (new_tokenizer, 0)):
        command_line = list(map(str, [*given, "--target_tokenizer_path", tokenizer]))
        done = subprocess.run(command_line, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert (tmp_path / "target").exists() == (code == 0)
        if code:
            assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_presets_make_a_model_for_the_tokenizer(
    dtype: str, new_tokenizer: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        flags = {"target_tokenizer_path": new_tokenizer, "target_model_path": tmp_path / name}
        assert init(preset="tiny", dtype=dtype, **flags) == 0
    first, second = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)
    model, _ = _load(tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert model.dtype == DTYPES[dtype]
    assert model.config.vocab_size == len(tokenizer)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (1, 2)
    assert (tmp_path / "a" / "generation_config.json").is_file()
    assert len({path.stat().st_mode for path in (tmp_path / "a").iterdir()}) == 1


def test_the_seed_decides_the_weights(old_tokenizer: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        flags = {"target_tokenizer_path": old_tokenizer, "target_model_path": tmp_path / str(seed)}
        assert init(preset="tiny", seed=seed, **flags) == 0
    first, second = (tensors(tmp_path / name)["lm_head.weight"] for name in "12")
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({}, "either --source_model_and_tokenizer_path or --preset"),
        ({"preset": "huge"}, "baby-llama2-115m, demo"),
        ({"preset": "missing.json"}, "missing.json"),
        ({"preset": "tiny", "source_model_and_tokenizer_path": "x"}, "either"),
        ({"preset": "tiny", "dtype": "int8"}, "--dtype"),
        ({"preset": "tiny", "verify": "text"}, "--verify goes with --source"),
        ({"preset": "tiny", "init_strategy": "random"}, "--init_strategy goes with --source"),
        ({"source_model_and_tokenizer_path": "x", "verify": "no.txt"}, "no.txt: no such file"),
        ({"source_model_and_tokenizer_path": "x", "verify": ""}, "--verify is empty"),
        ({"source_model_and_tokenizer_path": "x", "init_strategy": "best"}, "--init_strategy"),
    ],
)
def test_flag_mistakes(
    flags: dict[str, object],
    complaint: str,
    old_tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "target"
    assert init(target_tokenizer_path=old_tokenizer, target_model_path=target, **flags) == 2
    assert complaint in capsys.readouterr().err
    assert not target.exists()


def _load(directory: Path) -> tuple[Any, dict[str, Any]]:
    return AutoModelForCausalLM.from_pretrained(
        directory, torch_dtype="auto", output_loading_info=True
    )
