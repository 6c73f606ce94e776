"""Which parameters train."""

from __future__ import annotations

from typing import Any


def freeze_non_embeddings(model: Any) -> None:
    """Leaves only the input and output embeddings of a Hugging Face model trainable."""
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    for parameter in model.parameters():
        parameter.requires_grad = id(parameter) in embeddings
