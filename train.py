"""Continue pretraining, or fine-tune; start it with ``colossalai run`` or ``torchrun``."""

import sys

from colossal_llama.training.train import main

if __name__ == "__main__":
    sys.exit(main())
