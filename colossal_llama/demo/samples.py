"""Lets several models continue the same prompts, for a look at what training changed.

python -m colossal_llama.demo.samples --model_paths base,adapted --output samples.json
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama.command import option, run
from colossal_llama.demo import conversations
from colossal_llama.inference.generate import GenerateOptions, continuation
from colossal_llama.inference.loading import load_model_and_tokenizer
from colossal_llama.storage import write_json

PROMPTS = {
    "zh": ("中国经济的发展", "昨天，记者在北京"),
    "en": ("This function returns", "If the value of the argument"),
}


@dataclass
class SampleOptions:
    """Continues a few Chinese and English prompts with each model."""

    model_paths: list[Path] = option(help="model directories, comma-separated", comma=True)
    output: Path = option(help="the JSON file to write")
    max_new_tokens: int = option(48, help="tokens per prompt")
    temperature: float = option(0.7, help="as of the inference command")
    seed: int = option(42, help="of the random draw; counted up from prompt to prompt")


def write_samples(options: SampleOptions) -> None:
    """Writes a list of model_path, language, prompt, asked (what the model was given), text."""
    samples: list[dict[str, Any]] = []
    for path in options.model_paths:
        model, tokenizer = load_model_and_tokenizer(path, "cpu")
        chat = bool(tokenizer.chat_template)
        for language, prompts in PROMPTS.items():
            for number, prompt in enumerate(prompts):
                # A chat model is asked in the words that it was fine-tuned with.
                asked = conversations.PROMPTS[language][0].format(prompt) if chat else prompt
                settings = GenerateOptions(
                    model_path=path,
                    input_txt=asked,
                    max_new_tokens=options.max_new_tokens,
                    temperature=options.temperature,
                    seed=options.seed + number,
                )
                text = continuation(model, tokenizer, settings)
                sample = {"model_path": str(path), "language": language, "prompt": prompt}
                samples.append({**sample, "asked": asked, "text": text})
                print(f"{path}\n  {asked!r}: {text!r}")
    write_json(options.output, samples)


if __name__ == "__main__":
    sys.exit(run(SampleOptions, write_samples, prog="python -m colossal_llama.demo.samples"))
