"""Imports what trainings need, and then forks processes that have it already.

    python tests/nursery_worker.py SOCKET

Answers on the Unix socket until stdin is closed. A request is a line of JSON. For one that names
a ``script`` a process is forked that runs it, with the two file descriptors that come with the
request as stdout and stderr; the answers are its process id and, when it has ended, its exit code
(a signal's is negative). For one that names none a process is forked that keeps a store for a
process group, as ``torchrun`` does, until the connection is closed; the answer is its port.
``nursery.py`` is the other end.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import selectors
import socket
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

# Besides what these import: what is imported in the midst of a training.
WARM = (
    *("torch.distributed", "colossal_llama.training.assembly", "colossal_llama.training.train"),
    *("transformers.models.llama.modeling_llama", "transformers.models.llama.tokenization_llama"),
    *("pyarrow.ipc", "rich.logging", "sentencepiece", "multiprocessing.synchronize"),
    *("tensorboard.summary.writer.record_writer", "tensorboard.compat.proto.event_pb2"),
)


def warm_up() -> None:
    for name in WARM:
        importlib.import_module(name)
    from transformers import AutoModelForCausalLM

    list(AutoModelForCausalLM._model_mapping.keys())  # imports a file for each kind of model
    # Collecting garbage of a million imported objects takes as long as a training.
    gc.collect()
    gc.freeze()


def serve(path: str) -> dict[str, Any] | None:
    """Answers until stdin is closed, and returns None; in a process for a script, its request."""
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind(path)
        listener.listen()
        selector.register(listener, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            if any(key.fileobj is sys.stdin for key, _ in selector.select()):
                reap()
                return None
            connection, _ = listener.accept()
            if os.fork() == 0:
                break
            connection.close()
            reap()
    with connection:
        return keep(connection)


def reap() -> None:
    """Takes note of those of ours that have ended."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def keep(connection: socket.socket) -> dict[str, Any]:
    """Forks and watches the process that was asked for; returns only there."""
    line, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 2)
    while not line.endswith(b"\n"):
        line += connection.recv(1 << 20)
    request = json.loads(line)
    if "script" not in request:
        keep_store(connection)
        os._exit(0)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for own, descriptor in enumerate(descriptors, 1):
            os.dup2(descriptor, own)
            os.close(descriptor)
        return request
    connection.sendall(f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def keep_store(connection: socket.socket) -> None:
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    connection.sendall(f"{store.port}\n".encode())
    connection.recv(1)


def run(request: dict[str, Any]) -> None:
    """Runs the script as Python would that was started with it.

    ``runpy`` would leave frames without a file on the stack, which ``inspect``, that ColossalAI
    asks for its caller at every step, looks for in all modules in vain.
    """
    os.environ.clear()
    os.environ.update(request["environment"])
    warnings.resetwarnings()
    script = Path(request["script"])
    sys.argv = [str(script), *request["arguments"]]
    sys.path[0] = str(script.parent)
    sys.modules["nursery_worker"] = sys.modules["__main__"]
    sys.modules["__main__"] = main = ModuleType("__main__")
    main.__file__ = str(script)
    exec(compile(script.read_bytes(), str(script), "exec"), main.__dict__)


if __name__ == "__main__":
    warm_up()
    found = serve(sys.argv[1])
    if found is None:
        os._exit(0)  # to take apart all that was imported takes a second
    run(found)
