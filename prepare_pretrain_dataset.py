"""Raw text to packed, bucketed Arrow data: ``python prepare_pretrain_dataset.py --help``."""

import sys

from colossal_llama.command import run
from colossal_llama.dataset.prepare_pretrain import (
    PretrainDatasetOptions,
    prepare_pretrain_dataset,
)

if __name__ == "__main__":
    sys.exit(run(PretrainDatasetOptions, prepare_pretrain_dataset))
