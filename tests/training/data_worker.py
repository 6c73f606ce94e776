"""One of several processes that open the data of a run.

    RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 python tests/training/data_worker.py STORE FLAGS...

Prints the number of rows or the user's mistake, then how many files it has hashed. STORE is a
file that does not exist yet.
"""

import os
import sys

import torch.distributed as dist

from colossal_llama import command
from colossal_llama.dataset import loader
from colossal_llama.errors import DataError
from colossal_llama.training.arguments import TrainOptions
from colossal_llama.training.data import open_rows


def main() -> None:
    store, *flags = sys.argv[1:]
    options = command.parse(TrainOptions, flags)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    hashed = []
    sha256 = loader._sha256
    loader._sha256 = lambda path, advance: hashed.append(path) or sha256(path, advance)
    try:
        print(len(open_rows(options)))
    except DataError as error:
        print(f"error: {error}")
    print(f"hashed {len(hashed)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
