"""Lets several models continue the same prompts, for a look at what training changed.

python -m colossal_llama.demo.samples --model_paths base,adapted --output samples.json
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama.command import option, run
from colossal_llama.inference.generate import GenerateOptions, continuation
from colossal_llama.inference.loading import load_model_and_tokenizer
from colossal_llama.storage import write_json

PROMPTS = {
    "zh": ("中国经济的发展", "记者昨天从北京"),
    "en": ("This function returns", "The value of the"),
}


@dataclass
class SampleOptions:
    """Continues a few Chinese and English prompts with each model."""

    model_paths: list[Path] = option(help="model directories, comma-separated", comma=True)
    output: Path = option(help="the JSON file to write")
    max_new_tokens: int = option(48, help="tokens per prompt")
    temperature: float = option(0.3, help="as of the inference command")
    seed: int = option(42, help="of the random draw")


def write_samples(options: SampleOptions) -> None:
    """Writes a list of model_path, language, format (text or chat), prompt and text."""
    samples: list[dict[str, Any]] = []
    for path in options.model_paths:
        model, tokenizer = load_model_and_tokenizer(path, "cpu")
        for language, prompts in PROMPTS.items():
            for prompt in prompts:
                settings = GenerateOptions(
                    model_path=path,
                    input_txt=prompt,
                    max_new_tokens=options.max_new_tokens,
                    temperature=options.temperature,
                    seed=options.seed,
                )
                text = continuation(model, tokenizer, settings)
                samples.append(
                    {
                        "model_path": str(path),
                        "language": language,
                        "format": "chat" if tokenizer.chat_template else "text",
                        "prompt": prompt,
                        "text": text,
                    }
                )
                print(f"{path}\n  {prompt!r}: {text!r}")
    write_json(options.output, samples)


if __name__ == "__main__":
    sys.exit(run(SampleOptions, write_samples, prog="python -m colossal_llama.demo.samples"))
