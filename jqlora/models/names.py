"""Where each tensor of a checkpoint belongs: Hugging Face's names, derived from Linen's paths.

Modules are called as in the checkpoint, so a name is the path with dots. Two things differ: a leaf
has Linen's name (``kernel`` for ``weight``), and a scanned stack has one leaf for all layers, whose
numbers follow the stack's name: ``bert/encoder/layer/output/dense/kernel`` [L, K, N] holds
``bert.encoder.layer.{0..L-1}.output.dense.weight`` [N, K]. What a family adds is a row of
``Naming``.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from jqlora.tree import dotted, flatten
from jqlora.types import Path

# Linen's name of a leaf -> Hugging Face's, and whether its axes are stored in reverse order.
LEAVES = {
    "kernel": ("weight", True),
    "bias": ("bias", False),
    "scale": ("weight", False),
    "embedding": ("weight", False),
}
# How the first BERTs call what became LayerNorm.weight and LayerNorm.bias.
OLD_ENDS = {".gamma": ".weight", ".beta": ".bias"}


@dataclass(frozen=True, kw_only=True)
class HFName:
    """One tensor of a checkpoint, and the leaf it is or the layer of the leaf it fills.

    ``index`` is the position on the leaf's lead axis, None where the leaf has none. A transposed
    tensor is stored (out, in) where the leaf is (in, out).
    """

    hf: str
    path: Path
    index: int | None = None
    transpose: bool = False


@dataclass(frozen=True, kw_only=True)
class Naming:
    """How a family's checkpoints call their tensors.

    ``stacks``: dotted names of the modules that are lists of layers. ``base``: the module with all
    but the head; files of the bare base leave it out of their names. ``optional``: modules of the
    base that go with some heads only (a pooler). ``in_out``: names of dense modules that are stored
    (in, out), not (out, in). ``renames``: tensors whose name in the checkpoint does not follow from
    their path, ours to theirs. ``ties``: names under which files may repeat a tensor, each with the
    tensor's own. ``ignored``: regular expressions for the names of tensors that are no parameters
    (buffers that follow from the config, parts of a pretraining head). ``loose_head``: the tensor
    of a head of which the file says better than the config whether it is one of the ``ties``.
    """

    stacks: tuple[str, ...]
    base: str = ""
    optional: tuple[str, ...] = ()
    in_out: tuple[str, ...] = ()
    renames: Mapping[str, str] = field(default_factory=dict)
    ties: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    loose_head: str | None = None

    def tensors(self, params: Mapping[str, Any]) -> list[HFName]:
        """Every tensor of a checkpoint of these (abstract) parameters, layer by layer so that a
        file is read in order."""
        outside: list[HFName] = []
        layers: dict[tuple[int, int], list[HFName]] = {}
        for path, leaf in flatten(params).items():
            end, transpose = LEAVES[path[-1]]
            transpose &= path[-2] not in self.in_out
            module = [dotted(name, last=i == len(path) - 2) for i, name in enumerate(path[:-1])]
            place = self._stack(path)
            if place is None:
                full = ".".join((*module, end))
                hf = self.renames.get(full, full)
                outside.append(HFName(hf=hf, path=path, transpose=transpose))
                continue
            order, depth, number = place
            for i in range(leaf.shape[0]) if number is None else (number,):
                numbers = [str(i)] if number is None else []
                hf = ".".join((*module[:depth], *numbers, *module[depth:], end))
                index = i if number is None else None
                item = HFName(hf=hf, path=path, index=index, transpose=transpose)
                layers.setdefault((order, i), []).append(item)
        return [*outside, *(item for place in sorted(layers) for item in layers[place])]

    def canonical(self, name: str, roots: Collection[str]) -> str:
        """The present name of a file's tensor: ends as in new files, the base's name in front.

        ``roots`` are the first components of the names below ``base``.
        """
        for old, new in OLD_ENDS.items():
            if name.endswith(old):
                name = name.removesuffix(old) + new
        return f"{self.base}.{name}" if self.base and name.split(".")[0] in roots else name

    def roots(self, names: Collection[str]) -> set[str]:
        """First components below ``base``, where they are not top-level names as well."""
        parts = [name.split(".") for name in names]
        return {p[1] for p in parts if p[0] == self.base} - {p[0] for p in parts}

    def of_head(self, hf: str) -> bool:
        """Whether a tensor goes with the head, so that another head's file may lack it."""
        inside = hf.startswith(f"{self.base}.") if self.base else True
        return not inside or self.is_optional(hf)

    def is_optional(self, hf: str) -> bool:
        """Whether a tensor belongs to a part of the base that only some heads use."""
        return any(hf.startswith(f"{module}.") for module in self.optional)

    def is_ignored(self, hf: str) -> bool:
        """Whether a tensor of a file says nothing of its own."""
        return any(re.search(pattern, hf) for pattern in self.ignored)

    def _stack(self, path: Path) -> tuple[int, int, int | None] | None:
        """``(which stack, components up to the layer, its number if the path has it)``."""
        for order, stack in enumerate(self.stacks):
            *before, last = stack.split(".")
            depth = len(before)
            if list(path[:depth]) == before and len(path) > depth + 1:
                if path[depth] == last:
                    return order, depth + 1, None
                if match := re.fullmatch(rf"{last}_(\d+)", path[depth]):
                    return order, depth + 1, int(match[1])
        return None
