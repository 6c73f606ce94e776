"""What a line can say is not told in a page. (Peers that are gone: tests/integration/faults.)"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from colossal_llama import command
from colossal_llama.errors import ProcessError
from colossal_llama.runtime.failures import plainly

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"


def on_cuda() -> None:
    raise torch.cuda.OutOfMemoryError(f"{CUDA}\nand what it advises")


def torch_on_cpu() -> None:
    torch.empty(1 << 55)


def python_itself() -> None:
    bytearray(1 << 60)


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("action", [on_cuda, torch_on_cpu, python_itself])
def test_full_memory_is_a_line_of_each_process(
    action: Callable[[], None],
    rank: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work() -> None:
        try:
            action()
        except Exception as error:
            plain = plainly(error)
            assert plain is not None
            raise plain from None

    monkeypatch.setenv("LOCAL_RANK", rank)
    assert command.exit_code(work) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: rank 0 on ")  # there is no process group here
    for word in ("memory", "colossal-llama estimate", "--use_grad_checkpoint"):
        assert word in line


def test_how_much_was_missing_is_said() -> None:
    plain = plainly(torch.cuda.OutOfMemoryError(CUDA))
    assert isinstance(plain, ProcessError)
    assert "to allocate 2" in str(plain)


@pytest.mark.parametrize("text", ["", "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"])
def test_bugs_keep_their_traceback(text: str) -> None:
    assert plainly(RuntimeError(text)) is None
