"""Where adapters can go: the linear-like modules of a Linen model, found by tracing it once.

The model is run abstractly (no memory, no FLOPs) while an observer watches every module call. What
a module sees of its own parameters, held against how they are stored, tells everything else:
leading axes of the stored kernel that the module does not see were taken off on the way by
``nn.scan`` or ``nn.vmap``, and the first module on the path that no longer sees such an axis is
the one that carries it. That is where the layer number belongs in a name.

Names for matching are Hugging Face's dotted ones, one per layer::

    ("model", "layers", "self_attn", "q_proj"), lead (32,)  ->
    model.layers.{0..31}.self_attn.q_proj ("model", "layers_3", "self_attn", "q_proj")
    ->  model.layers.3.self_attn.q_proj

In any other Linen model the same rules give, for example, ``encoder.blocks.4.MlpBlock_0.Dense_1``:
a lower-case component ending in ``_<number>`` that has modules below it is read as a layer of a
list, while a module's own name and names that Flax made from a class (``Dense_1``) stay as they
are.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax

from jqlora.tree import dotted, flatten
from jqlora.types import Path

LEAVES = ("kernel", "embedding")
"""Names under which linear-like modules keep their matrix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """A module that an adapter can serve.

    Invariants: the stored matrix ``{path}/{leaf}`` has shape ``[*lead, *shape_in, *shape_out]``,
    and the module sees ``[*shape_in, *shape_out]`` of it. ``template`` holds one ``{}`` per lead
    axis. ``problem`` says why no adapter can serve the module, or is None.
    """

    path: Path
    kind: str  # "dense", "embed", or "other" for what is matched only when asked for by name
    leaf: str
    lead: tuple[int, ...]
    shape_in: tuple[int, ...]
    shape_out: tuple[int, ...]
    template: str
    attended: bool = False
    problem: str | None = None

    @property
    def features_in(self) -> int:
        """K: rows of the matrix; the vocabulary's size for an embedding."""
        return math.prod(self.shape_in)

    @property
    def features_out(self) -> int:
        """N: columns of the matrix."""
        return math.prod(self.shape_out)

    @property
    def leaf_path(self) -> Path:
        """Path of the matrix in ``params``."""
        return (*self.path, self.leaf)

    @property
    def names(self) -> tuple[str, ...]:
        """One dotted name per layer, row-major over ``lead``."""
        return layer_names(self.template, self.lead)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """Any parameter: its path, logical shape and dtype, lead axes, and its module's name
    template."""

    path: Path
    shape: tuple[int, ...]
    dtype: Any
    lead: tuple[int, ...]
    template: str

    @property
    def names(self) -> tuple[str, ...]:
        """Dotted names of the module that owns the parameter, one per layer."""
        return layer_names(self.template, self.lead)


@dataclasses.dataclass(frozen=True)
class Survey:
    """What one abstract trace found: the sites in calling order, and every parameter."""

    sites: tuple[Site, ...]
    leaves: tuple[Leaf, ...]


def layer_names(template: str, lead: tuple[int, ...]) -> tuple[str, ...]:
    """``template`` filled with every index over ``lead``, row-major."""
    return tuple(template.format(*index) for index in itertools.product(*map(range, lead)))


@dataclasses.dataclass
class Observer:
    """Watches a trace of a model; ``survey`` then reports. Use it as a Linen method interceptor."""

    stored: dict[Path, jax.ShapeDtypeStruct]
    removed: dict[tuple[Path, int], int] = dataclasses.field(default_factory=dict)
    seen: dict[Path, "_Seen"] = dataclasses.field(default_factory=dict)
    attended: set[Path] = dataclasses.field(default_factory=set)

    def __call__(
        self,
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        result = next_fun(*args, **kwargs)
        module, method = context.module, context.method_name
        if method == "setup" or not module.path:
            return result
        view = flatten(module.variables.get("params", {}))
        for relative, leaf in view.items():
            path = (*module.path, *relative)
            if path in self.stored:
                taken = self.stored[path].ndim - leaf.ndim
                spot = (path, len(module.path))
                self.removed[spot] = max(taken, self.removed.get(spot, 0))
        if method == "attend" and isinstance(module, nn.Embed):
            self.attended.add(module.path)
        if method == "__call__":
            own = next((name for name in LEAVES if (name,) in view), None)
            if own is not None and (*module.path, own) in self.stored:
                inputs = args[0] if args else kwargs.get("inputs")
                self.seen[module.path] = _describe(module, own, view[(own,)].shape, inputs)
        return result

    def survey(self) -> Survey:
        """Sites and leaves, once the trace is over."""
        sites = tuple(self._site(path, seen) for path, seen in self.seen.items())
        leaves = []
        for path, stored in self.stored.items():
            taken = self.removed.get((path, len(path) - 1), 0)
            lead = tuple(stored.shape[:taken])
            template = self._template(path)
            leaves.append(
                Leaf(
                    path=path, shape=stored.shape, dtype=stored.dtype, lead=lead, template=template
                )
            )
        return Survey(sites, tuple(leaves))

    def _site(self, path: Path, seen: "_Seen") -> Site:
        stored = self.stored[(*path, seen.leaf)]
        taken = stored.ndim - len(seen.shape)
        problem = seen.problem
        if problem is None and tuple(stored.shape[taken:]) != seen.shape:
            problem = (
                f"its {seen.leaf} {stored.shape} is stacked along an axis that is not in front"
            )
        return Site(
            path=path,
            kind=seen.kind,
            leaf=seen.leaf,
            lead=tuple(stored.shape[:taken]),
            shape_in=seen.shape[: seen.inputs],
            shape_out=seen.shape[seen.inputs :],
            template=self._template((*path, seen.leaf)),
            attended=path in self.attended,
            problem=problem,
        )

    def _template(self, leaf: Path) -> str:
        """The owning module's dotted name; ``{}`` follows the component that carries a lead
        axis."""
        parts: list[str] = []
        placed = 0
        for depth, component in enumerate(leaf[:-1], start=1):
            parts.append(dotted(component, last=depth == len(leaf) - 1))
            taken = self.removed.get((leaf, depth), placed)
            parts += ["{}"] * (taken - placed)
            placed = max(placed, taken)
        return ".".join(parts)


def abstract(params: Mapping[str, Any]) -> dict[Path, jax.ShapeDtypeStruct]:
    """Logical shapes and dtypes by path; a quantized leaf counts as the matrix it stands for."""
    return {p: jax.ShapeDtypeStruct(v.shape, v.dtype) for p, v in flatten(params).items()}


def traced_and_static(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Array-like leaves of ``tree``, and a function that puts (traced) arrays back in their
    places."""
    leaves, treedef = jax.tree.flatten(tree)
    spots = [
        i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    ]

    def rebuild(arrays: list[Any]) -> Any:
        filled = list(leaves)
        for spot, array in zip(spots, arrays, strict=True):
            filled[spot] = array
        return jax.tree.unflatten(treedef, filled)

    return [leaves[i] for i in spots], rebuild


@dataclasses.dataclass(frozen=True)
class _Seen:
    """How a module looked when it was called: its matrix as it sees it, ``inputs`` axes of it
    being in."""

    kind: str
    leaf: str
    shape: tuple[int, ...]
    inputs: int
    problem: str | None = None


def _describe(module: nn.Module, leaf: str, shape: tuple[int, ...], inputs: Any) -> _Seen:
    shape = tuple(shape)
    for cls, describe in REGISTRY.items():
        if isinstance(module, cls):
            return describe(module, leaf, shape, inputs)
    problem = f"{type(module).__name__} is no linear layer that adapters know"
    return _Seen("other", leaf, shape, max(len(shape) - 1, 0), problem)


def _describe_dense(module: nn.Module, leaf: str, shape: tuple[int, ...], inputs: Any) -> _Seen:
    return _Seen("dense", leaf, shape, 1)


def _describe_embed(module: nn.Module, leaf: str, shape: tuple[int, ...], inputs: Any) -> _Seen:
    return _Seen("embed", leaf, shape, 1)


def _describe_general(module: nn.Module, leaf: str, shape: tuple[int, ...], inputs: Any) -> _Seen:
    assert isinstance(module, nn.DenseGeneral)
    axes = module.axis if isinstance(module.axis, tuple) else (module.axis,)
    positions = tuple(axis % inputs.ndim for axis in axes)
    problem = None
    if module.batch_dims:
        problem = (
            f"nn.DenseGeneral with batch_dims={module.batch_dims} has one matrix per batch entry"
        )
    elif positions != tuple(range(inputs.ndim - len(axes), inputs.ndim)):
        problem = (
            f"nn.DenseGeneral contracts axes {axes}, which are not its input's last ones in order"
        )
    return _Seen("dense", leaf, shape, len(axes), problem)


def _describe_einsum(module: nn.Module, leaf: str, shape: tuple[int, ...], inputs: Any) -> _Seen:
    return _Seen("dense", leaf, shape, max(len(shape) - 1, 0), "nn.Einsum is not supported")


REGISTRY: dict[type[nn.Module], Callable[..., _Seen]] = {
    nn.Dense: _describe_dense,
    nn.Embed: _describe_embed,
    nn.DenseGeneral: _describe_general,
    nn.Einsum: _describe_einsum,
}
"""Linear-like modules, and how each lays out its matrix; lifted and derived classes count too."""


def without_numbers(names: Iterator[str] | tuple[str, ...]) -> dict[str, str]:
    """``{name with layer numbers as *: first such name}``, to list modules without repeating
    layers."""
    short: dict[str, str] = {}
    for name in names:
        short.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", name), name)
    return short
