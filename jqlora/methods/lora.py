"""LoRA: a low-rank term beside a frozen matrix (Hu et al., arXiv 2106.09685, §4.1).

    y = x W + s · (x a) b        a [K, R], b [R, N],  s = alpha / r, or alpha / √r when
    rank-stabilized

with ``a`` drawn at random and ``b`` zero, so that training starts from the base model. (The
paper's and PEFT's A and B are our ``a`` and ``b`` transposed.) The rank-stabilized scale is
Kalajdzievski's (arXiv 2312.03732, theorem 3.2). In an embedding ``a [V, R]`` is looked up instead
of multiplied; there PEFT draws ``b`` and leaves ``a`` zero, and applies no dropout, and so do we.

Layers of one scanned stack may have different ranks: the leaves are then as wide as the largest,
and the surplus columns of ``a`` and rows of ``b`` are both zero. Each then multiplies the other's
gradient, so they stay zero under any optimizer that leaves a zero with a zero gradient where it
is.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jqlora.errors import ConfigError
from jqlora.methods.base import (
    Leaves,
    Method,
    Placement,
    check_rank,
    check_targeting,
    freeze,
    items,
)
from jqlora.methods.low_rank import add_low_rank, check_rank_fits, low_rank_constants
from jqlora.methods.targeting import check_pattern, pattern_value
from jqlora.tree import fold_in_path

INITS = ("kaiming", "gaussian")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """Where LoRA goes and how large it is; the fields mean what PEFT's ``LoraConfig`` means by
    them.

    ``rank``, ``alpha``
        r and α of every module that no pattern names.
    ``targets``, ``exclude``
        ``"all-linear"``, one regular expression for the whole module name, or names that end it.
    ``dropout``
        Probability of zeroing an entry of x on its way into ``a``; active when a key is given.
    ``rank_pattern``, ``alpha_pattern``
        ``{regular expression at the end of a module name: value}``; the first that matches holds.
    ``layers_to_transform``
        Numbers of the layers to adapt; None for all.
    ``rank_stabilized``
        Scale by α/√r instead of α/r.
    ``modules_to_save``
        Ends of names of modules to train whole; they are copied into the collection ``full``.
    ``init``
        ``"kaiming"``: a ~ U(±1/√K), PEFT's default; ``"gaussian"``: a ~ N(0, 1/r²).

    Raises :class:`ConfigError` for a value outside its range.

    >>> LoRA(rank=16, alpha=32, targets=["q_proj", "v_proj"]).targets
    ('q_proj', 'v_proj')
    """

    rank: int = 8
    alpha: float = 16
    targets: str | Sequence[str] = "all-linear"
    exclude: str | Sequence[str] = ()
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] | Sequence[tuple[str, int]] = ()
    alpha_pattern: Mapping[str, float] | Sequence[tuple[str, float]] = ()
    layers_to_transform: int | Sequence[int] | None = None
    rank_stabilized: bool = False
    modules_to_save: str | Sequence[str] = ()
    init: str = "kaiming"

    def __post_init__(self) -> None:
        freeze(self)
        object.__setattr__(self, "rank_pattern", items(self.rank_pattern))
        object.__setattr__(self, "alpha_pattern", items(self.alpha_pattern))
        for field, rank in (("rank", self.rank), *_named("rank_pattern", self.rank_pattern)):
            check_rank(self, field, rank)
        for field, alpha in (("alpha", self.alpha), *_named("alpha_pattern", self.alpha_pattern)):
            if not alpha > 0:
                raise ConfigError(f"LoRA {field}={alpha!r}: must be positive")
        if self.init not in INITS:
            raise ConfigError(f"LoRA init={self.init!r}: known are {', '.join(INITS)}")
        check_targeting(self, *dict(items(self.rank_pattern)), *dict(items(self.alpha_pattern)))


def _named(field: str, pattern: Any) -> list[tuple[str, Any]]:
    return [(f"{field}[{key!r}]", value) for key, value in items(pattern)]


def ranks(placement: Placement) -> tuple[int, ...]:
    """Rank of every layer of a site, row-major over its lead axes; 0 where the layer is not
    served."""
    spec: LoRA = placement.spec
    pairs = zip(placement.site.names, placement.layers, strict=True)
    return tuple(
        int(pattern_value(items(spec.rank_pattern), name, spec.rank)) if served else 0
        for name, served in pairs
    )


def scales(placement: Placement) -> tuple[float, ...]:
    """s of every layer of a site: α/r or α/√r, and 0 where the layer is not served."""
    spec: LoRA = placement.spec
    root = math.sqrt if spec.rank_stabilized else float
    return tuple(
        pattern_value(items(spec.alpha_pattern), name, spec.alpha) / root(rank) if rank else 0.0
        for name, rank in zip(placement.site.names, ranks(placement), strict=True)
    )


def check(spec: LoRA, placements: Sequence[Placement]) -> None:
    """Raise for a pattern that matches nothing and for a rank that its matrix cannot hold."""
    check_pattern("rank_pattern", (key for key, _ in items(spec.rank_pattern)), placements)
    check_pattern("alpha_pattern", (key for key, _ in items(spec.alpha_pattern)), placements)
    for placement in placements:
        check_rank_fits(max(ranks(placement)), placement)


def parameters(placement: Placement) -> int:
    """r (K + N), over the layers."""
    site = placement.site
    return sum(ranks(placement)) * (site.features_in + site.features_out)


def init(key: jax.Array, placement: Placement) -> dict[str, jax.Array]:
    """``a [*lead, K, R]`` and ``b [*lead, R, N]``, fp32; each layer's numbers depend on its name
    alone."""
    site = placement.site
    keys = jnp.stack([fold_in_path(key, tuple(name.split("."))) for name in site.names])
    sizes, width = jnp.asarray(ranks(placement)), max(ranks(placement))
    a_shape, b_shape = (site.features_in, width), (width, site.features_out)
    if site.kind == "embed":
        a = jnp.zeros((len(keys), *a_shape), jnp.float32)
        b = _draw(keys, sizes, b_shape, 0, "normal")
    else:
        a = _draw(keys, sizes, a_shape, 1, placement.spec.init)
        b = jnp.zeros((len(keys), *b_shape), jnp.float32)
    return {"a": a.reshape(*site.lead, *a_shape), "b": b.reshape(*site.lead, *b_shape)}


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _draw(
    keys: jax.Array, sizes: jax.Array, shape: tuple[int, int], axis: int, init: str
) -> jax.Array:
    """[layers, *shape], of which each layer uses its size of ``axis``; zeros behind that.

    One layer after the other: a program that draws all at once takes three times as long to
    compile. It serves all sites of a shape.
    """

    def one(layer: tuple[jax.Array, jax.Array]) -> jax.Array:
        key, size = layer
        if init == "kaiming":
            bound = 1.0 / math.sqrt(shape[0])  # torch's kaiming_uniform_ with a=√5 and fan_in=K
            # 2u - 1 is exact: the one rounding that is left is the same in every compiled program
            drawn = (2.0 * jax.random.uniform(key, shape, jnp.float32) - 1.0) * bound
        else:
            drawn = jax.random.normal(key, shape, jnp.float32)
            if init == "gaussian":
                drawn = drawn / jnp.maximum(size, 1).astype(jnp.float32)
        used = jnp.expand_dims(jnp.arange(shape[axis]) < size, 1 - axis)
        return jnp.where(used, drawn, 0.0)

    return jax.lax.map(one, (keys, sizes))


def constants(placement: Placement) -> dict[str, Any]:
    """Those of :func:`~jqlora.methods.low_rank.low_rank_constants`."""
    return low_rank_constants(placement, scales(placement))


def effect(
    x: jax.Array, y: jax.Array, leaves: Leaves, placement: Placement, key: jax.Array | None
) -> jax.Array:
    """y + s · (x a) b, in y's dtype, in which the products are taken with fp32 accumulation."""
    return add_low_rank(x, y, leaves["a"], leaves["b"], leaves, placement, key)


def delta(leaves: Leaves, placement: Placement) -> jax.Array:
    """s · a b, fp32 ``[*lead, K, N]``."""
    scale = jnp.asarray(constants(placement)["scale"])[..., None, None]
    a, b = leaves["a"].astype(jnp.float32), leaves["b"].astype(jnp.float32)
    return jnp.matmul(a * scale, b, precision=jax.lax.Precision.HIGHEST)


METHOD = Method(
    collection="lora",
    check=check,
    ranks=ranks,
    parameters=parameters,
    init=init,
    constants=constants,
    effect=effect,
    delta=delta,
)
