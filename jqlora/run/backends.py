"""Which backend will multiply by each quantized matrix of a run, and why others will not."""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from jqlora import tree
from jqlora.config import RunConfig
from jqlora.quant import QTensor, choose_backends
from jqlora.run import choices
from jqlora.run.head import choose, describe_model
from jqlora.types import Params


def backend_lines(
    config: RunConfig, traced_for: AbstractContextManager[Any] | None = None
) -> list[str]:
    """In sentences, for this process's device or the one that the context ``traced_for`` names;
    only headers of files are read, nothing runs."""
    dtype = choices.compute_dtype(config.model)
    _, params = describe_model(config, choose(config), weightless=True)
    rows = config.train.batch_size // config.train.accumulate * config.data.length
    with traced_for or nullcontext():
        return backends_of(params, rows, dtype)


def backends_of(params: Params, rows: int, dtype: str) -> list[str]:
    """A line for each answer that some matrix of ``params`` gets; none without such a matrix."""
    answers: dict[str, list[str]] = {}
    asked: dict[tuple, str] = {}
    for path, leaf in tree.flatten(params).items():
        if not isinstance(leaf, QTensor):
            continue
        kind = (leaf.matrix_shape, leaf.spec, leaf.layout, bool(leaf.lead))
        if kind not in asked:
            product, gradient = choose_backends(leaf, rows, dtype)
            same = str(product) == str(gradient)
            asked[kind] = str(product) if same else f"{product}; for the gradient {gradient}"
        count = math.prod(leaf.lead)
        name = ".".join(path[:-1])
        answers.setdefault(asked[kind], []).append(name if count == 1 else f"{name} (x{count})")
    return [
        f"kernels    {answer}: {rows:,} rows times {shortened(names)}"
        for answer, names in answers.items()
    ]


def shortened(names: Iterable[str]) -> str:
    """The first names of many."""
    first, *others = names
    return f"{first} and {len(others)} more" if others else first
