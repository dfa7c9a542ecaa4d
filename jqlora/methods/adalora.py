"""AdaLoRA: a low-rank term in the form of a singular value decomposition, whose rank is allotted
while training (Zhang et al., arXiv 2303.10512).

    y = x W + s · ((x P) Λ) Q        P [K, R], Λ diagonal, Q [R, N],  s = alpha / (init_rank + 1e-5)

with P and Q drawn from N(0, 0.02²) and Λ zero, so that training starts from the base model. One
column of P, entry of Λ and row of Q are a *triplet*; which triplets of the whole model are kept is
decided by :func:`jqlora.optim.adalora`. (The paper's and PEFT's matrices act on columns: our P is
PEFT's ``lora_A`` and the paper's Q, transposed.) The scale is that of the initial rank for ever,
as in the authors' code and in PEFT: it changes neither when triplets are pruned nor when they are
removed. 1e-5 is theirs too; it is kept so that outputs are equal.

P and Q are kept near orthogonal by a penalty, by either of two definitions:

* ``"paper"``: γ Σ (‖Pᵀ P - I‖² + ‖Q Qᵀ - I‖²), Frobenius, over all matrices (section 3.1);
* ``"peft"``: γ times the *mean* over all matrices of the norms themselves, *not* squared.

Layers of one scanned stack may be left with different ranks: see :mod:`jqlora.methods.lora`.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jqlora.errors import ConfigError, NoSiteMatched
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
from jqlora.tree import fold_in_path, nearest

ORTHOGONALITY = ("peft", "paper")
DEVIATION = 0.02
"""Standard deviation of fresh P and Q, the authors' and PEFT's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoRA:
    """Where AdaLoRA goes, the rank it starts with and the mean rank it ends with.

    ``init_rank``, ``target_rank``
        Rank of every adapted matrix at the start, and their mean at the end.
    ``alpha``
        The term is scaled by ``alpha / init_rank``, at the end too.
    ``targets``, ``exclude``, ``dropout``, ``layers_to_transform``, ``modules_to_save``
        As in :class:`LoRA`.
    ``orthogonality``, ``orthogonality_weight``
        Which penalty keeps P and Q near orthogonal, ``"peft"`` or ``"paper"``, and its weight γ.
    ``rank_pattern``
        ``{module: init_rank booleans}``, which of a module's triplets are left. It is what
        ``jq.compact`` and loading a pruned adapter leave behind; modules not named have them all.

    Raises :class:`ConfigError` for a value outside its range.

    >>> AdaLoRA(init_rank=12, target_rank=8, targets=["q_proj", "v_proj"]).init_rank
    12
    """

    init_rank: int = 12
    target_rank: int = 8
    alpha: float = 16
    targets: str | Sequence[str] = "all-linear"
    exclude: str | Sequence[str] = ()
    dropout: float = 0.0
    layers_to_transform: int | Sequence[int] | None = None
    modules_to_save: str | Sequence[str] = ()
    orthogonality: str = "peft"
    orthogonality_weight: float = 0.5
    rank_pattern: Mapping[str, Sequence[bool]] | Sequence[tuple[str, Sequence[bool]]] = ()

    def __post_init__(self) -> None:
        freeze(self)
        pattern = tuple((name, tuple(map(bool, kept))) for name, kept in items(self.rank_pattern))
        object.__setattr__(self, "rank_pattern", pattern)
        check_rank(self, "init_rank", self.init_rank)
        check_rank(self, "target_rank", self.target_rank)
        if self.target_rank > self.init_rank:
            raise ConfigError(
                f"AdaLoRA target_rank={self.target_rank} must not exceed "
                f"init_rank={self.init_rank}: ranks are only pruned"
            )
        if not self.alpha > 0:
            raise ConfigError(f"AdaLoRA alpha={self.alpha!r}: must be positive")
        if self.orthogonality not in ORTHOGONALITY:
            known = ", ".join(ORTHOGONALITY)
            raise ConfigError(f"AdaLoRA orthogonality={self.orthogonality!r}: known are {known}")
        if not self.orthogonality_weight >= 0:
            raise ConfigError(
                f"AdaLoRA orthogonality_weight={self.orthogonality_weight!r}: must be at least 0"
            )
        for name, kept in pattern:
            if len(kept) != self.init_rank:
                raise ConfigError(
                    f"AdaLoRA rank_pattern[{name!r}] has {len(kept)} entries, expected "
                    f"init_rank={self.init_rank}"
                )
        check_targeting(self)


def ranks(placement: Placement) -> tuple[int, ...]:
    """Number of triplets of every layer of a site, row-major over its lead axes; 0 where the layer
    is not served, or has none left."""
    spec: AdaLoRA = placement.spec
    left = {name: sum(kept) for name, kept in items(spec.rank_pattern)}
    pairs = zip(placement.site.names, placement.layers, strict=True)
    return tuple(left.get(name, spec.init_rank) if served else 0 for name, served in pairs)


def used(placement: Placement) -> np.ndarray:
    """Booleans ``[*lead, R]``: which triplets of the leaves there are; the others are padding."""
    sizes = ranks(placement)
    width = max(1, *sizes)  # one column even where nothing is left: no leaf is empty
    flat = np.arange(width) < np.asarray(sizes)[:, None]
    return flat.reshape(*placement.site.lead, width)


def check(spec: AdaLoRA, placements: Sequence[Placement]) -> None:
    """Raise for a pattern that names no adapted module and a rank that its matrix cannot hold."""
    names = [name for placement in placements for name in placement.names]
    for name in dict(items(spec.rank_pattern)):
        if name not in names:
            close = ", ".join(nearest(name, names))
            raise NoSiteMatched(f"rank_pattern key '{name}' is no adapted module; nearest: {close}")
    for placement in placements:
        check_rank_fits(max(ranks(placement)), placement)


def parameters(placement: Placement) -> int:
    """r (K + 1 + N), over the layers."""
    site = placement.site
    return sum(ranks(placement)) * (site.features_in + 1 + site.features_out)


def init(key: jax.Array, placement: Placement) -> dict[str, jax.Array]:
    """``p [*lead, K, R]``, ``lam [*lead, 1, R]`` (zero) and ``q [*lead, R, N]``, fp32; each layer's
    numbers depend on its name alone."""
    site, real = placement.site, used(placement)
    keys = jnp.stack([fold_in_path(key, tuple(name.split("."))) for name in site.names])
    p, q = _draw(
        keys, jnp.asarray(real.reshape(len(keys), -1)), site.features_in, site.features_out
    )
    return {
        "p": p.reshape(*site.lead, *p.shape[1:]),
        "lam": jnp.zeros((*site.lead, 1, real.shape[-1]), jnp.float32),
        "q": q.reshape(*site.lead, *q.shape[1:]),
    }


@functools.partial(jax.jit, static_argnums=(2, 3))
def _draw(keys: jax.Array, real: jax.Array, k: int, n: int) -> tuple[jax.Array, jax.Array]:
    """p [layers, K, R] and q [layers, R, N], one layer after the other: a program that draws all at
    once takes three times as long to compile. It serves all sites of a shape."""
    width = real.shape[-1]

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        first, second = jax.random.split(key)
        p = jax.random.normal(first, (k, width), jnp.float32)
        return p * DEVIATION, jax.random.normal(second, (width, n), jnp.float32) * DEVIATION

    p, q = jax.lax.map(one, keys)
    return jnp.where(real[:, None, :], p, 0.0), jnp.where(real[:, :, None], q, 0.0)


def scale_of(spec: AdaLoRA) -> float:
    """s, the same for all modules and for ever."""
    return spec.alpha / (spec.init_rank + 1e-5)


def constants(placement: Placement) -> dict[str, Any]:
    """Those of :func:`~jqlora.methods.low_rank.low_rank_constants`."""
    return low_rank_constants(placement, [scale_of(placement.spec)] * len(placement.layers))


def effect(
    x: jax.Array, y: jax.Array, leaves: Leaves, placement: Placement, key: jax.Array | None
) -> jax.Array:
    """y + s · (x PΛ) Q, in y's dtype, in which the products are taken with fp32 accumulation;
    PΛ is taken in fp32."""
    p, lam = (leaves[name].astype(jnp.float32) for name in ("p", "lam"))
    return add_low_rank(x, y, p * lam, leaves["q"], leaves, placement, key)


def delta(leaves: Leaves, placement: Placement) -> jax.Array:
    """s · PΛQ, fp32 ``[*lead, K, N]``."""
    p, lam, q = (leaves[name].astype(jnp.float32) for name in ("p", "lam", "q"))
    return jnp.matmul(
        p * lam * np.float32(scale_of(placement.spec)), q, precision=jax.lax.Precision.HIGHEST
    )


def penalty(leaves: Sequence[Leaves], placements: Sequence[Placement]) -> jax.Array:
    """The orthogonality penalty of one spec, over every matrix P and Q that it serves."""
    spec: AdaLoRA = placements[0].spec
    squares = []  # of the distance of each Gram matrix from the identity
    for leaf, placement in zip(leaves, placements, strict=True):
        identity = np.eye(leaf["lam"].shape[-1], dtype=np.float32) * used(placement)[..., None]
        p, q = (leaf[name].astype(jnp.float32) for name in ("p", "q"))
        for gram in (p.mT @ p, q @ q.mT):
            squares.append(jnp.sum((gram - identity) ** 2, axis=(-2, -1)).ravel())
    distances = jnp.concatenate(squares)
    if spec.orthogonality == "paper":
        return spec.orthogonality_weight * distances.sum()
    count = 2 * sum(sum(placement.layers) for placement in placements)
    positive = distances > 0  # the norm has no gradient at zero, where padding is; torch takes 0
    norms = jnp.where(positive, jnp.sqrt(jnp.where(positive, distances, 1.0)), 0.0)
    return spec.orthogonality_weight * norms.sum() / count


METHOD = Method(
    collection="adalora",
    check=check,
    ranks=ranks,
    parameters=parameters,
    init=init,
    constants=constants,
    effect=effect,
    delta=delta,
    penalty=penalty,
)
