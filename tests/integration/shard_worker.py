"""``worker.py`` with Gemini chunks so small that a tiny model is divided over the ranks.

    torchrun --nproc_per_node 2 tests/integration/shard_worker.py jobs.json

By default Gemini keeps what is smaller than 32 million parameters whole on every rank.
"""

import sys
from pathlib import Path
from typing import Any

from colossalai.booster.plugin import GeminiPlugin

sys.path.insert(0, str(Path(__file__).parent))

import worker

original = GeminiPlugin.__init__


def small_chunks(self: Any, **settings: Any) -> None:
    sizes = {"min_chunk_size_m": 0.01, "search_range_m": 1, "hidden_dim": 32}
    original(self, **{**settings, **sizes})


if __name__ == "__main__":
    GeminiPlugin.__init__ = small_chunks
    worker.main()
