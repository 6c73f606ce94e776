"""Talk to a model: one prompt in, its continuation or answer out.

colossal-llama inference --model_path model --input_txt "明月松间照，"
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama.command import option, run
from colossal_llama.errors import DataError
from colossal_llama.inference.loading import DTYPES, load_model_and_tokenizer, text_ids


@dataclass
class GenerateOptions:
    """Prints what the model says to --input_txt."""

    model_path: Path = option(help="model directory in Hugging Face format")
    input_txt: str = option(help="the prompt")
    device: str = option("auto", help="cpu, cuda, cuda:1, ...; auto: an accelerator if there is")
    dtype: str = option("auto", choices=DTYPES, help="auto: float32 on a CPU, else the weights'")
    prompt_format: str = option(
        "auto",
        choices=("auto", "chat", "text"),
        help="chat: the prompt is a question to the assistant; text: the prompt is continued; "
        "auto: chat if the tokenizer has a chat template",
    )
    max_new_tokens: int = option(512, help="stop after so many tokens")
    do_sample: bool = option(True, help="draw each token at random; false: take the likeliest")
    temperature: float = option(0.3, help="flattens (> 1) or sharpens (< 1) the distribution")
    top_k: int = option(50, help="draw from the so many likeliest tokens; 0: from all")
    top_p: float = option(0.95, help="draw from the likeliest tokens that make up this share")
    seed: int | None = option(None, help="draw the same tokens every time")

    def problems(self) -> list[str]:
        """What is wrong with the flags."""
        found = []
        if not self.input_txt:
            found.append("--input_txt is empty")
        if self.max_new_tokens < 1:
            found.append("--max_new_tokens must be positive")
        if self.temperature <= 0:
            found.append("--temperature must be positive (for the likeliest: --do_sample false)")
        if self.top_k < 0:
            found.append("--top_k must not be negative")
        if not 0 < self.top_p <= 1:
            found.append("--top_p must be above 0 and at most 1")
        return found


def generate(options: GenerateOptions) -> None:
    """Loads the model and prints its text alone, so that it can be piped."""
    model, tokenizer = load_model_and_tokenizer(options.model_path, options.device, options.dtype)
    print(continuation(model, tokenizer, options))


def continuation(model: Any, tokenizer: Any, options: GenerateOptions) -> str:
    """What the model adds to the prompt, without special tokens.

    Raises:
        DataError: the prompt leaves no room in the model's context.
    """
    import torch
    from transformers import GenerationConfig

    chat = options.prompt_format == "chat" or (
        options.prompt_format == "auto" and bool(tokenizer.chat_template)
    )
    prompt = prompt_ids(tokenizer, options.input_txt, chat=chat)
    sampling: dict[str, Any] = {"do_sample": options.do_sample}
    if options.do_sample:
        sampling.update(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    ends = _end_ids(model, tokenizer, chat=chat)
    config = GenerationConfig(
        max_new_tokens=_room(model, len(prompt), options.max_new_tokens),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,  # asked for, but never used with one prompt
        **sampling,
    )
    if options.seed is not None:
        torch.manual_seed(options.seed)
    input_ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=config,
            use_model_defaults=False,  # the flags decide, not the model's generation_config.json
        )
    new = output[0, len(prompt) :].tolist()
    if chat:
        return tokenizer.decode(new, skip_special_tokens=True).strip()
    # SentencePiece drops a leading space: decode with the prompt, then take the prompt off.
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    return tokenizer.decode(prompt + new, skip_special_tokens=True).removeprefix(before)


def prompt_ids(tokenizer: Any, text: str, *, chat: bool) -> list[int]:
    """The prompt as ids: a question in the chat template, or bos and the plain text."""
    if not chat:
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return bos + text_ids(tokenizer, text)
    from colossal_llama.dataset.chat.chat_format import encode_conversation

    messages = [{"from": "human", "content": text}]
    return encode_conversation(tokenizer, messages, add_generation_prompt=True)[0]


def _end_ids(model: Any, tokenizer: Any, *, chat: bool) -> list[int]:
    """The ids that end a text: the tokenizer's eos, and those that a chat model has besides.

    A chat model's are what its generation_config.json names, and what ends an answer by the chat
    template, which was learned in training.
    """
    named = model.generation_config.eos_token_id if model.generation_config else None
    candidates = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    if chat:
        from colossal_llama.dataset.chat.chat_format import turn_end_id

        candidates.append(turn_end_id(tokenizer))
    return list(dict.fromkeys(token for token in candidates if token is not None))


def _room(model: Any, prompt_length: int, wanted: int) -> int:
    context = getattr(model.config, "max_position_embeddings", None)
    if context is None or prompt_length + wanted <= context:
        return wanted
    if prompt_length >= context:
        raise DataError(
            f"the prompt has {prompt_length} tokens and the model's context only {context}; "
            "shorten --input_txt"
        )
    room = context - prompt_length
    print(f"note: the model's context leaves room for {room} tokens", file=sys.stderr)
    return room


if __name__ == "__main__":
    sys.exit(run(GenerateOptions, generate))
