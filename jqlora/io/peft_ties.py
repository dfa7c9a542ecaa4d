"""Embeddings that a model uses more than once, and where PEFT's files have a place for them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jqlora.errors import AdapterFileError
from jqlora.io.peft_config import PREFIX
from jqlora.io.readers import TensorReader
from jqlora.methods import Plan
from jqlora.methods.targeting import OUTPUT_HEAD
from jqlora.types import Path

SHARED = "shared"
"""What encoder-decoders call the embedding of both sides."""


def tied_embedding(plan: Plan, model: Any) -> Path | None:
    """Path of the embedding that the plan trains whole and the model also uses as its head."""
    task = model.task
    if task not in ("causal-lm", "masked-lm") or not model.config.tie_word_embeddings:
        return None
    found = next((leaf.path for leaf in plan.full if leaf.path[-1] == "embedding"), None)
    if found is not None and task == "masked-lm":
        raise AdapterFileError(
            f"{'.'.join(found[:-1])} is trained whole, but a masked-LM head shares it, for which "
            "PEFT's files have no place"
        )
    return found


def refuse_shared(plan: Plan) -> None:
    """An encoder-decoder's embedding has three names in PEFT's models, which adapt each apart."""
    paths = [placement.site.path for placement in plan.placements]
    paths += [leaf.path[:-1] for leaf in plan.full]
    shared = next((path for path in paths if path[-1] == SHARED), None)
    if shared is not None:
        raise AdapterFileError(
            f"{'.'.join(shared)} is the embedding of encoder and decoder, which PEFT's files have "
            "no one place for: leave it out"
        )


def tied_copies(
    config: Mapping[str, Any], plan: Plan, model: Any, reader: TensorReader
) -> set[str]:
    """The head's copy of a tied embedding, which says nothing of its own; it must be equal."""
    head = f"{PREFIX}{OUTPUT_HEAD}.weight"
    tied = tied_embedding(plan, model)
    if tied is None or head not in reader.names():
        return set()
    embedding = f"{PREFIX}{'.'.join(tied[:-1])}.weight"
    if embedding in reader.names() and not np.array_equal(
        reader.read(head), reader.read(embedding)
    ):
        raise AdapterFileError(f"{reader.where(head)}: {head} differs from {embedding}, its tie")
    return {head}
