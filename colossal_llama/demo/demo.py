"""The whole pipeline on real text, from one command, with a report at the end.

    colossal-llama demo --out demo_out

Safe to interrupt: run it again and it goes on after the last stage that finished.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from colossal_llama.command import option, run
from colossal_llama.demo.plan import SIZES, stages
from colossal_llama.demo.runner import run_stages
from colossal_llama.errors import DataError
from colossal_llama.storage import write_json

ROOT = Path(__file__).resolve().parents[2]
_OWNED = "demo.json"


@dataclass
class DemoOptions:
    """Teaches a small Llama Chinese on this machine's own text, and reports what was gained.

    Runs on the CPU, even where there is a GPU, and needs no network. About five minutes on two
    cores.
    """

    out: Path = option(Path("demo_out"), help="directory of everything the demo makes")
    size: str = option("full", choices=tuple(SIZES), help="small: only to see that it works")
    overwrite: bool = option(False, help="start anew instead of going on with what --out holds")

    def problems(self) -> list[str]:
        """What is wrong with the flags."""
        shown = as_shown(self.out)
        if re.search(r"[^\w./@+-]", shown):
            # colossalai run joins its arguments with blanks and hands them to a shell.
            return [f"--out {shown}: the launcher cannot take blanks and signs in a path"]
        return []


def demo(options: DemoOptions) -> int:
    """Runs the stages, writes the report, and says which marks were missed.

    Returns:
        0, or 1 if a mark was missed.

    Raises:
        DataError: the repository, the output directory or an optional package is not as needed.
        StageError: a stage's command failed.
    """
    check_installation()
    out, shown = options.out.resolve(), as_shown(options.out)
    prepare_directory(out, options)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        records = run_stages(stages(shown, SIZES[options.size]), out, ROOT)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on from here ({out})", file=sys.stderr)
        raise
    from colossal_llama.demo.figures import collect
    from colossal_llama.demo.report import summary, write_report

    figures = collect(out, shown, ROOT, records)
    report = write_report(figures, out)
    print(f"\n{summary(figures)}\n\nreport: {report}")
    missed = [mark["name"] for mark in figures["marks"] if not mark["met"]]
    if missed:
        print(
            f"error: {len(missed)} of the demo's marks missed: {'; '.join(missed)}", file=sys.stderr
        )
    return 1 if missed else 0


def as_shown(out: Path) -> str:
    """The directory as it stands in the commands: relative to the repository if inside it."""
    path = out.resolve()
    return os.path.relpath(path, ROOT) if path.is_relative_to(ROOT) else str(path)


def check_installation() -> None:
    """Raises DataError if what the demo needs beside the package is missing."""
    if not (ROOT / "train.py").is_file():
        raise DataError(
            "the demo runs the scripts of the repository, and this installation has none; "
            "clone the repository and run it there (make demo)"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise DataError("the report's plot needs matplotlib; run: pip install matplotlib")


def prepare_directory(out: Path, options: DemoOptions) -> None:
    """Makes ``out``, or accepts it if the demo made it; stages remove what they write anew.

    Raises:
        DataError: the directory holds something else.
    """
    owned = (out / _OWNED).is_file()
    if out.exists() and not owned and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} holds something that is not the demo's; choose another --out")
    if owned and options.overwrite:
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / _OWNED, {"size": options.size})


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(run(DemoOptions, demo))
