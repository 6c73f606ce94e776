"""Runs several mistaken calls of ``train.py`` in one process: importing takes longer than they do.

    python tests/integration/error_worker.py calls.json

``calls.json`` maps names to flag lists. The last line printed maps the names to the exit code
and what stderr was told.
"""

import contextlib
import io
import json
import sys

from colossal_llama import command
from colossal_llama.runtime.distributed import distributed
from colossal_llama.training.train import TrainOptions, train


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as stream:
        calls = json.load(stream)
    results = {}
    with distributed(seed=0):
        for name, flags in calls.items():
            with contextlib.redirect_stderr(io.StringIO()) as said:
                try:
                    code = command.run(TrainOptions, train, flags)
                except Exception as error:
                    code = f"{type(error).__name__}: {error}"
            results[name] = (code, said.getvalue())
    print(json.dumps(results))


if __name__ == "__main__":
    main()
