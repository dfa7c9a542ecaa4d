"""Whole parameter trees: which leaves are stored as codes, and what that leaves them weighing."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jqlora import tree
from jqlora.quant.qtensor import QTensor
from jqlora.quant.quantize import quantize
from jqlora.quant.spec import Storage
from jqlora.types import Params, Path

SKIP = (
    *("lm_head", "cls", "lm_predictions", "classifier", "score", "qa_outputs"),
    "classification_head",
    "conv",
    "DenseReluDense.wo",
)
"""What is not quantized unless asked for: output heads of every task, convolutions, and what takes
T5's largest activations, as in transformers."""


def is_quantized_path(path: Path, ndim: int, skip: tuple[str, ...] = SKIP) -> bool:
    """Whether the leaf at ``path`` is stored as codes: the kernel of a dense layer, not skipped.

    A layer is skipped if any part of its path, or several with dots between, is in ``skip``. The
    output head is by default, as in transformers: its rounding errors reach the logits undamped.
    """
    name = f".{'.'.join(path)}."
    return path[-1] == "kernel" and ndim >= 2 and not any(f".{part}." in name for part in skip)


def quantize_params(params: Params, spec: Storage, skip: tuple[str, ...] = SKIP) -> dict[str, Any]:
    """The tree with every dense kernel [*lead, K, N] but the skipped ones as ``QTensor``.

    Leaves may be ``ShapeDtypeStruct``; quantized ones are then ``QTensor`` of them. A leaf that is
    a ``QTensor`` already stays as it is.
    """

    def store(path: Path, leaf: Any) -> Any:
        if isinstance(leaf, QTensor) or not is_quantized_path(path, leaf.ndim, skip):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.eval_shape(lambda kernel: quantize(kernel, spec), leaf)
        return quantize(leaf, spec)

    return tree.unflatten({path: store(path, leaf) for path, leaf in tree.flatten(params).items()})


@dataclass(frozen=True)
class Footprint:
    """Bytes on the device and numbers of parameters, stored as codes and otherwise."""

    quantized_params: int
    quantized_bytes: int
    other_params: int
    other_bytes: int

    @property
    def bytes(self) -> int:
        return self.quantized_bytes + self.other_bytes

    @property
    def bits_per_quantized_param(self) -> float:
        """Stored bits a quantized parameter, scales included; 0 if there is none."""
        return 8 * self.quantized_bytes / max(self.quantized_params, 1)

    def __str__(self) -> str:
        return (
            f"{self.quantized_params:,} parameters in {self.quantized_bytes / 2**20:,.1f} MiB "
            f"({self.bits_per_quantized_param:.3f} bits each) and {self.other_params:,} others "
            f"in {self.other_bytes / 2**20:,.1f} MiB"
        )


def footprint(params: Mapping[str, Any]) -> Footprint:
    """What a tree weighs, from the shapes and dtypes of its leaves, which may be abstract."""
    leaves = tree.flatten(params).values()
    quantized = [leaf for leaf in leaves if isinstance(leaf, QTensor)]
    others = [leaf for leaf in leaves if not isinstance(leaf, QTensor)]
    return Footprint(
        quantized_params=sum(q.size for q in quantized),
        quantized_bytes=sum(q.nbytes for q in quantized),
        other_params=sum(math.prod(a.shape) for a in others),
        other_bytes=sum(math.prod(a.shape) * a.dtype.itemsize for a in others),
    )
