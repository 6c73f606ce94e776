"""Conversations to Arrow data: ``python prepare_sft_dataset.py --help``."""

import sys

from colossal_llama.command import run
from colossal_llama.dataset.prepare_sft import SftDatasetOptions, prepare_sft_dataset

if __name__ == "__main__":
    sys.exit(run(SftDatasetOptions, prepare_sft_dataset))
