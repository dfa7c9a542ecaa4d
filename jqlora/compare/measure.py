"""Two observations become measurements, each with its budget; their order is that of computing."""

import dataclasses
from collections.abc import Sequence
from math import isfinite
from typing import Any

import jax.numpy as jnp
import numpy as np

from jqlora.compare.budgets import BUDGETS, EXACT, FEW, NO_FURTHER, ROUNDING, Budgets, Quantity
from jqlora.compare.observation import Arrays, Observation

FILES = "files"
SILENT = 1e-6
"""Share of the largest gradient below which a whole leaf is the rounding of zero in fp32."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """How far one thing differs. ``largest`` is the largest difference between the two sides and
    ``relative`` the same relative to its scale; ``error`` is what the budget is held against."""

    quantity: str
    name: str
    largest: float
    relative: float
    error: float
    budget: float

    @property
    def passed(self) -> bool:
        return self.error <= self.budget  # NaN does not pass

    def to_json(self) -> dict[str, Any]:
        """What JSON can say; a number that is not finite is null."""
        found = dataclasses.asdict(self) | {"passed": self.passed}
        return {
            k: None if isinstance(v, float) and not isfinite(v) else v for k, v in found.items()
        }


def measure(
    ours: Observation,
    theirs: Observation,
    *,
    dtype: str,
    stacks: Sequence[str],
    exact: Observation | None = None,
) -> list[Measurement]:
    """Everything observed, compared within the budgets of ``dtype``.

    ``stacks`` are the names of the model's stacks of layers; ``exact`` is the other side in the
    wider dtype, and where it is there, it is what ours is held to. bf16 has no budget without it.
    """
    budgets = BUDGETS[dtype]
    if budgets.calibrated and exact is None:
        raise ValueError(f"the budgets of {dtype} need the exact result")
    made = list(_hidden(ours, theirs, exact, budgets, stacks))
    made += _logits(ours, theirs, exact, budgets)
    curves = (ours.losses, theirs.losses, None if exact is None else exact.losses)
    a, b, c = (curve and curve[:1] for curve in curves)
    made.append(_losses("loss", "of the first batch", a, b, c, budgets))
    made += _gradients(ours.gradients, theirs.gradients, exact and exact.gradients, budgets)
    relative = np.abs(np.subtract(*curves[:2])) / np.abs(curves[1])
    worst = f"worst at step {int(np.argmax(relative)) + 1} of {len(relative)}"
    made.append(_losses("loss curve", worst, *curves, budgets))
    moved = _with_gradient((exact or theirs).gradients)
    made.append(_adapters(moved, ours.after, theirs.after, exact and exact.after, budgets))
    return made


def same_files(name: str, ours: Arrays, theirs: Arrays, dtype: str = "float32") -> Measurement:
    """Tensors that must be equal bit for bit; ``error`` counts those that are not, or are missing.

    What ``theirs`` holds in ``dtype``, as values of fp32, may be the rounded value of ours.
    """
    wrong, largest = len(theirs.keys() ^ ours.keys()), 0.0
    for key in theirs.keys() & ours.keys():
        mine, found = ours[key], theirs[key]
        if mine.shape != found.shape:
            wrong += 1
        elif not _same(mine, found) and not _same(_rounded(mine, dtype), found):
            wrong += 1
            gap = np.abs(np.asarray(mine, np.float64) - np.asarray(found, np.float64))
            largest = max(largest, float(gap.max()))
    return Measurement(FILES, f"{name}: {len(theirs)} tensors", largest, largest, wrong, EXACT)


def equal_codes(count: int, different: int) -> Measurement:
    """That bitsandbytes quantizes ``count`` weights as they are stored, all but ``different``."""
    name = f"codes as bitsandbytes makes them: {count} weights"
    return Measurement(FILES, name, different, different, different, EXACT)


def layer_names(field: str, count: int, stacks: Sequence[str]) -> list[str]:
    """Names of ``count`` hidden states: what goes into the first layer, then after each layer."""
    stack = stacks[1] if field.startswith("decoder") and len(stacks) > 1 else stacks[0]
    return [f"embeddings before {stack}", *(f"{stack}.{i}" for i in range(count - 1))]


def _hidden(
    ours: Observation,
    theirs: Observation,
    exact: Observation | None,
    budgets: Budgets,
    stacks: Sequence[str],
) -> Any:
    if ours.hidden.keys() != theirs.hidden.keys():
        raise ValueError(f"states {list(ours.hidden)} here, {list(theirs.hidden)} there")
    for field, states in theirs.hidden.items():
        mine = ours.hidden[field]
        if len(mine) != len(states):
            raise ValueError(f"{field}: {len(mine)} states here, {len(states)} there")
        for i, name in enumerate(layer_names(field, len(states), stacks)):
            reference = None if exact is None else exact.hidden[field][i]
            arrays = (mine[i], states[i], reference)
            yield _array("hidden states", name, *arrays, budgets, by_feature=True)


def _logits(
    ours: Observation, theirs: Observation, exact: Observation | None, budgets: Budgets
) -> Any:
    for name, found in theirs.logits.items():
        reference = usual = None
        if exact is not None:
            reference = exact.logits[name]
            last = (
                (states[-1], exact.hidden[field][-1]) for field, states in theirs.hidden.items()
            )
            usual = max(_off(*pair) for pair in last) if found.size < FEW else None
        yield _array("logits", name, ours.logits[name], found, reference, budgets, usual=usual)


def _array(
    quantity: Quantity,
    name: str,
    ours: Any,
    theirs: Any,
    exact: Any,
    budgets: Budgets,
    **options: Any,
) -> Measurement:
    """``options`` are those of :func:`_measured`."""
    span = float(theirs.max() - theirs.min())
    return _measured(quantity, name, ours, theirs, exact, span, budgets, **options)


def _with_gradient(gradients: Arrays) -> list[str]:
    """The leaves whose gradient is more than rounding. A bias that is added to all logits under a
    softmax has none, and AdamW moves it as rounding has it."""
    sizes = {name: _largest(leaf) for name, leaf in gradients.items()}
    return [name for name, size in sizes.items() if size > SILENT * max(sizes.values())]


def _gradients(
    ours: Arrays, theirs: Arrays, exact: Arrays | None, budgets: Budgets
) -> list[Measurement]:
    """Leaf by leaf, and in bf16 together; a leaf that is only rounding is held against the largest
    entry of all."""
    top = max(_largest(leaf) for leaf in theirs.values())
    moved = _with_gradient(theirs if exact is None else exact)
    usual = None if exact is None else _rms(_distances(theirs, exact, moved))
    made = []
    for name, found in theirs.items():
        reference = None if exact is None else exact[name]
        floor = 0.0 if name in moved else top
        span = max(_largest(found), floor)
        arrays = (ours[name], found, reference)
        made.append(_measured("gradients", name, *arrays, span, budgets, floor=floor, usual=usual))
    if exact is not None and budgets.calibrated:
        limit = budgets.limits["gradients together"]
        made.append(_together(moved, ours, theirs, exact, limit))
    return made


def _together(names: list[str], ours: Arrays, theirs: Arrays, exact: Arrays, limit: float) -> Any:
    """Root mean squares over the leaves of both sides' relative distances."""
    mine, found = (_rms(_distances(side, exact, names)) for side in (ours, theirs))
    largest = max(_largest(ours[name] - theirs[name]) for name in names)
    return Measurement(
        "gradients together",
        f"all {len(names)} leaves that have a gradient",
        largest,
        _rms(_distances(ours, theirs, names)),
        _ratio(mine, max(found, ROUNDING)),
        limit,
    )


def _distances(found: Arrays, reference: Arrays, names: list[str]) -> np.ndarray:
    """Of every leaf the root mean square of its distance, relative to its own."""
    return np.array([_off(found[name], reference[name]) for name in names])


def _off(found: np.ndarray, true: np.ndarray) -> float:
    """Root mean square of the distance, relative to that of ``true``."""
    return _ratio(_rms(np.asarray(found, np.float64) - true), _rms(true))


def _adapters(
    names: list[str], ours: Arrays, theirs: Arrays, exact: Arrays | None, budgets: Budgets
) -> Measurement:
    """All leaves that have a gradient as one, by root mean squares."""
    a, b = (np.concatenate([tree[name].ravel() for name in names]) for tree in (ours, theirs))
    c = None if exact is None else np.concatenate([exact[name].ravel() for name in names])
    name = f"all {len(names)} leaves that have a gradient"
    return _measured("adapters", name, a, b, c, _largest(b), budgets, whole=True)


def _measured(
    quantity: Quantity,
    name: str,
    ours: Any,
    theirs: Any,
    exact: Any,
    span: float,
    budgets: Budgets,
    *,
    whole: bool = False,
    floor: float = 0.0,
    usual: float | None = None,
    by_feature: bool = False,
) -> Measurement:
    """``whole``: fp32 is judged by root mean squares instead of by the largest difference.
    ``floor`` is the least size whose rounding counts. In bf16, ``usual`` says that these are few
    numbers, and their side's relative distance from the exact result in others like them, and
    ``by_feature`` that every feature on the last axis counts relative to its own size."""
    if ours.shape != theirs.shape:
        raise ValueError(f"{quantity}, {name}: shape {ours.shape} here, {theirs.shape} there")
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    limit, size = budgets.limits[quantity], _rms if whole else _largest
    scale = _rms(theirs) if whole else span
    largest = _largest(ours - theirs)
    error = _ratio(size(ours - theirs), scale)
    if exact is not None:
        exact = np.asarray(exact, np.float64)
        if budgets.calibrated:
            share = max(ROUNDING, usual or 0.0)
            unit = _of_features(exact) if by_feature else 1.0
            noise = max(_rms((theirs - exact) / unit), share * max(_rms(exact / unit), floor))
            limit = limit if usual is None else budgets.limits["gradients"]
            error = _ratio(_rms((ours - exact) / unit), noise)
        else:
            error = _ratio(size(ours - exact), scale)
            limit = max(limit, NO_FURTHER * _ratio(size(theirs - exact), scale))
    return Measurement(quantity, name, largest, _ratio(largest, span), error, limit)


def _of_features(states: np.ndarray) -> np.ndarray:
    """Root mean square of each feature [D] over the tokens; of all of them where one is zero."""
    sizes = np.sqrt(np.mean(np.square(states.reshape(-1, states.shape[-1])), axis=0))
    return np.where(sizes > 0, sizes, _rms(states) or 1.0)


def _losses(
    quantity: Quantity, name: str, ours: Any, theirs: Any, exact: Any, budgets: Budgets
) -> Measurement:
    mine, found = np.asarray(ours), np.asarray(theirs)
    limit = budgets.limits[quantity]
    error = relative = _largest((mine - found) / found)
    if exact is not None:
        true = np.asarray(exact)
        if budgets.calibrated:
            noise = max(_largest(found - true), ROUNDING * _largest(true))
            error = _ratio(_largest(mine - true), noise)
        else:
            error = _largest((mine - true) / true)
            limit = max(limit, NO_FURTHER * _largest((found - true) / true))
    return Measurement(quantity, name, _largest(mine - found), relative, error, limit)


def _ratio(value: float, scale: float) -> float:
    return 0.0 if value == 0.0 else value / scale if scale else float("inf")


def _largest(values: Any) -> float:
    return float(np.abs(values).max(initial=0.0))


def _rms(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if values.size else 0.0


def _same(left: np.ndarray, right: np.ndarray) -> bool:
    return left.dtype == right.dtype and left.tobytes() == right.tobytes()


def _rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    return array.astype(jnp.dtype(dtype)).astype(array.dtype)
