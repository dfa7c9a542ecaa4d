"""Rotary parameters in config.json, in the old spelling and the new, both ways.

Old: ``rope_theta``, ``rope_scaling``, ``partial_rotary_factor`` and Gemma 3's
``rope_local_base_freq`` side by side; new: all in ``rope_parameters``, for Gemma 3 one set for each
kind of layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jqlora.errors import CheckpointError
from jqlora.models.hf_keys import Reader, refuse
from jqlora.models.rope import SCALINGS, Rope

ORIGINAL = "original_max_position_embeddings"
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class RopeKeys:
    """What one kind of model says about its rotary embedding beyond the common keys.

    ``local_theta`` is the default base of windowed layers where they have one of their own;
    ``longrope_names`` are older names of longrope; ``partial`` allows to rotate a part of a head.
    """

    theta: float = 10000.0
    local_theta: float | None = None
    longrope_names: tuple[str, ...] = ()
    partial: bool = False


COMMON = RopeKeys()


def read_rope(
    read: Reader, keys: RopeKeys, *, head_dim: int, max_positions: int
) -> tuple[Rope, Rope | None]:
    """Rotary embedding of the layers, and that of windowed layers if they have their own.

    Precedence is transformers'. Raises CheckpointError for what would be computed differently.
    """
    key = "rope_scaling" if read.hf.get("rope_scaling") else "rope_parameters"
    given = dict(read.hf.get(key) or {})
    local = None
    if keys.local_theta is not None:
        local = _read_local(read, keys.local_theta, dict(given.pop(SLIDING, None) or {}))
        given = dict(given.pop(FULL, None) or {}) | given
    if any(isinstance(value, Mapping) for value in given.values()):
        refuse(key, given, "one set of rotary parameters for all layers")
    old_name = given.pop("type", "default")
    name = given.pop("rope_type", None) or old_name
    name = "longrope" if name in keys.longrope_names else name
    if name not in SCALINGS:
        refuse(f"{key}['rope_type']", name, SCALINGS)
    theta = given.pop("rope_theta", None) or read.get("rope_theta") or keys.theta
    partial = given.pop("partial_rotary_factor", None) or read.get("partial_rotary_factor") or 1.0
    if partial != 1.0 and not (keys.partial and 0 < partial < 1):
        accepted = "a factor above 0, at most 1" if keys.partial else "1.0"
        refuse("partial_rotary_factor", partial, accepted)
    given = {option: value for option, value in given.items() if value is not None}
    _check_options(key, name, given)
    if ORIGINAL in SCALINGS[name].known:
        given.setdefault(ORIGINAL, max_positions)
        if read.get(ORIGINAL) is not None:
            given[ORIGINAL] = read.get(ORIGINAL)
    for option in ("short_factor", "long_factor"):
        if option in given:
            given[option] = _read_factors(f"{key}['{option}']", given[option], head_dim * partial)
    options = tuple(sorted(given.items()))
    return Rope(type=name, theta=float(theta), options=options, partial=float(partial)), local


def _read_local(read: Reader, default: float, given: dict[str, Any]) -> Rope:
    name = given.pop("rope_type", None) or "default"
    if name != "default":
        refuse(f"rope_parameters['{SLIDING}']['rope_type']", name, ("default",))
    theta = given.pop("rope_theta", None) or read.get("rope_local_base_freq") or default
    _check_options(SLIDING, name, given)
    return Rope(theta=float(theta))


def _check_options(key: str, name: str, given: Mapping[str, Any]) -> None:
    scaling = SCALINGS[name]
    for option, value in given.items():
        if option not in scaling.known:
            refuse(
                f"{key}['{option}']",
                value,
                scaling.known or f"no option for rope_type {name!r}",
            )
    for option in scaling.required:
        if option not in given:
            raise CheckpointError(f"config.json: {key} of rope_type {name!r} lacks {option!r}")


def _read_factors(key: str, value: Any, dimensions: float) -> tuple[float, ...]:
    count = int(dimensions) // 2
    numbers = isinstance(value, list | tuple) and all(isinstance(v, int | float) for v in value)
    if not numbers or len(value) != count:
        refuse(key, value, f"{count} numbers, one for each frequency")
    return tuple(float(v) for v in value)


def write_rope(rope: Rope, local: Rope | None, spelling: str) -> dict[str, Any]:
    """Inverse of :func:`read_rope`."""
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in rope.options}
    partial = {} if rope.partial == 1.0 else {"partial_rotary_factor": rope.partial}
    outside: dict[str, Any] = {}
    if rope.type == "longrope":
        outside[ORIGINAL] = options[ORIGINAL]
    if spelling == "new":
        ours = {"rope_theta": rope.theta, "rope_type": rope.type, **options, **partial}
        if local is not None:
            ours = {FULL: ours, SLIDING: {"rope_theta": local.theta, "rope_type": local.type}}
        return {"rope_parameters": ours, **outside}
    scaling: dict[str, Any] | None = {"rope_type": rope.type, **options}
    if rope.type == "default":
        scaling = None
    elif rope.type == "longrope":
        # transformers 4 reads three keys of Phi-3's and accepts no others beside them
        scaling = {"type": rope.type, **{k: v for k, v in options.items() if k != ORIGINAL}}
    if local is not None:
        outside["rope_local_base_freq"] = local.theta
    return {"rope_theta": rope.theta, "rope_scaling": scaling, **partial, **outside}
