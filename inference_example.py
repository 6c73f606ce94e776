"""Talk to a model.

python inference_example.py --model_path model --input_txt "明月松间照，"
"""

import sys

from colossal_llama.command import run
from colossal_llama.inference.generate import GenerateOptions, generate

if __name__ == "__main__":
    sys.exit(run(GenerateOptions, generate))
