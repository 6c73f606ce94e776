"""Continue pretraining, or fine-tune; start it with ``colossalai run`` or ``torchrun``."""

import sys

from colossal_llama import command
from colossal_llama.training.train import TrainOptions, train

if __name__ == "__main__":
    sys.exit(command.run(TrainOptions, train))
