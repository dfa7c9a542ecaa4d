"""What a method of fine-tuning is: a spec, and a few pure functions in one row of a table.

A spec is a frozen dataclass that a user writes. Planning pairs it with the sites that it serves;
each pair is a :class:`Placement`, hashable and static under jit. The functions below are all that
the rest of the library knows of a method, so a new one is one file and one row in
``methods/__init__.py``.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax

from jqlora.errors import ConfigError
from jqlora.sites import Site

Leaves = Mapping[str, jax.Array]


class Spec(Protocol):
    """Fields by which every spec says where it goes; their meanings are PEFT's."""

    @property
    def targets(self) -> str | tuple[str, ...]: ...
    @property
    def exclude(self) -> str | tuple[str, ...]: ...
    @property
    def layers_to_transform(self) -> tuple[int, ...] | None: ...
    @property
    def modules_to_save(self) -> tuple[str, ...]: ...
    @property
    def dropout(self) -> float: ...


@dataclasses.dataclass(frozen=True)
class Placement:
    """One site served by one spec; ``layers`` tells, row-major over ``site.lead``, which layers
    are."""

    site: Site
    spec: Any
    layers: tuple[bool, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Dotted names of the layers that are served."""
        return tuple(
            name for name, served in zip(self.site.names, self.layers, strict=True) if served
        )

    def layer(self, index: int) -> "Placement":
        """The same for one layer (row-major over ``site.lead``), as if its module stood alone."""
        site = dataclasses.replace(self.site, lead=(), template=self.site.names[index])
        return Placement(site, self.spec, (self.layers[index],))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table of methods.

    ``collection``
        Name of the variable collection that holds the trainable leaves.
    ``check(spec, placements)``
        Raises where the spec cannot be met, before anything is allocated.
    ``ranks(placement)``
        Rank of every layer, row-major over ``site.lead``; 0 where the layer is not served.
    ``parameters(placement)``
        How many numbers are trained there, padding left out.
    ``init(key, placement)``
        Trainable leaves as they are drawn, fp32, each with the site's lead axes in front. Below,
        leaves may be bfloat16.
    ``constants(placement)``
        What the effect needs beside them: arrays ``[*lead, ...]`` that are not trained.
    ``effect(x, y, leaves, placement, key)``
        The module's new output. ``x`` is its input with features last ``[..., K]`` (token ids
        ``[...]`` for an embedding), ``y [..., N]`` its own output; ``leaves`` are one layer's,
        constants included; ``key`` is for dropout, None when deterministic.
    ``delta(leaves, placement)``
        What the adapter adds to the matrix, fp32 ``[*lead, K, N]``; None where it cannot be merged.
    ``penalty(leaves, placements)``
        A term of the loss that the method asks for: an fp32 scalar over all placements of one
        spec, whose leaves are given in the same order. None where it asks for none.
    """

    collection: str
    check: Callable[[Any, Sequence[Placement]], None]
    ranks: Callable[[Placement], tuple[int, ...]]
    parameters: Callable[[Placement], int]
    init: Callable[[jax.Array, Placement], dict[str, jax.Array]]
    constants: Callable[[Placement], dict[str, Any]]
    effect: Callable[[jax.Array, jax.Array, Leaves, Placement, jax.Array | None], jax.Array]
    delta: Callable[[Leaves, Placement], jax.Array | None]
    penalty: Callable[[Sequence[Leaves], Sequence[Placement]], jax.Array] | None = None


def frozen_names(value: str | Sequence[str], *, keep_string: bool) -> str | tuple[str, ...]:
    """A list of names as a tuple; a single string is a regular expression or one name by itself."""
    if isinstance(value, str):
        return value if keep_string else (value,)
    return tuple(value)


def items(pattern: Mapping[str, Any] | Sequence[tuple[str, Any]]) -> tuple[tuple[str, Any], ...]:
    """A mapping as a tuple of its items, so that the spec is hashable; idempotent."""
    pairs = pattern.items() if isinstance(pattern, Mapping) else pattern
    return tuple((str(key), value) for key, value in pairs)


def freeze(spec: Any) -> None:
    """Make the fields in which every spec says where it goes hashable; call it in
    ``__post_init__``."""
    layers = spec.layers_to_transform
    layers = (layers,) if isinstance(layers, int) else layers
    frozen = {
        "targets": frozen_names(spec.targets, keep_string=True),
        "exclude": frozen_names(spec.exclude, keep_string=True),
        "modules_to_save": frozen_names(spec.modules_to_save, keep_string=False),
        "layers_to_transform": None if layers is None else tuple(layers),
    }
    for field, value in frozen.items():
        object.__setattr__(spec, field, value)


def check_rank(spec: Any, field: str, rank: Any) -> None:
    """Raise :class:`ConfigError` for a rank that is no whole number from 1 up."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        name = type(spec).__name__
        raise ConfigError(f"{name} {field}={rank!r}: a rank is a whole number from 1 up")


def check_targeting(spec: Any, *patterns: str) -> None:
    """Raise :class:`ConfigError` for a dropout outside [0, 1), empty targets, or an expression
    among the targets and ``patterns`` that cannot be parsed."""
    name = type(spec).__name__
    if not 0 <= spec.dropout < 1:
        raise ConfigError(f"{name} dropout={spec.dropout!r}: must be at least 0 and below 1")
    for expression in (*(t for t in (spec.targets, spec.exclude) if isinstance(t, str)), *patterns):
        try:
            re.compile(expression)
        except re.error as error:
            raise ConfigError(
                f"{name}: {expression!r} is no regular expression: {error}"
            ) from error
    if spec.targets == ():
        raise ConfigError(f"{name} targets=[]: name a module, or say 'all-linear'")
