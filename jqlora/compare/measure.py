"""Two observations become measurements, each with its budget; their order is that of computing."""

import dataclasses
from collections.abc import Sequence
from math import isfinite
from typing import Any

import jax.numpy as jnp
import numpy as np

from jqlora.compare.budgets import BUDGETS, EXACT, ROUNDING, Budgets, Quantity
from jqlora.compare.observation import Arrays, Observation

FILES = "files"


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

    ``stacks`` are the names of the model's stacks of layers; ``exact`` is the other side in fp32,
    which bf16 needs.
    """
    budgets = BUDGETS[dtype]
    if budgets.calibrated and exact is None:
        raise ValueError(f"the budgets of {dtype} need the exact result")
    exact = exact if budgets.calibrated else None
    made = list(_hidden(ours, theirs, exact, budgets, stacks))
    for name, found in theirs.logits.items():
        reference = None if exact is None else exact.logits[name]
        made.append(_array("logits", name, ours.logits[name], found, reference, budgets))
    curves = (ours.losses, theirs.losses, None if exact is None else exact.losses)
    a, b, c = (curve and curve[:1] for curve in curves)
    made.append(_losses("loss", "of the first batch", a, b, c, budgets))
    made += _leaves("gradients", ours.gradients, theirs.gradients, exact, budgets)
    relative = np.abs(np.subtract(*curves[:2])) / np.abs(curves[1])
    worst = f"worst at step {int(np.argmax(relative)) + 1} of {len(relative)}"
    made.append(_losses("loss curve", worst, *curves, budgets))
    made += _leaves("adapters", ours.after, theirs.after, exact, budgets)
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
            yield _array("hidden states", name, mine[i], states[i], reference, budgets)


def _array(
    quantity: Quantity, name: str, ours: Any, theirs: Any, exact: Any, budgets: Budgets
) -> Measurement:
    span = float(theirs.max() - theirs.min())
    return _measured(quantity, name, ours, theirs, exact, span, budgets)


def _leaves(
    quantity: Quantity,
    ours: Arrays,
    theirs: Arrays,
    exact: Observation | None,
    budgets: Budgets,
) -> list[Measurement]:
    made = []
    for name, found in theirs.items():
        reference = None
        if exact is not None:
            reference = (exact.gradients if quantity == "gradients" else exact.after)[name]
        span = float(np.abs(found).max(initial=0.0))
        made.append(_measured(quantity, name, ours[name], found, reference, span, budgets))
    return made


def _measured(
    quantity: Quantity, name: str, ours: Any, theirs: Any, exact: Any, span: float, budgets: Budgets
) -> Measurement:
    if ours.shape != theirs.shape:
        raise ValueError(f"{quantity}, {name}: shape {ours.shape} here, {theirs.shape} there")
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    largest = float(np.abs(ours - theirs).max(initial=0.0))
    relative = _ratio(largest, span)
    error = relative
    if exact is not None:
        exact = np.asarray(exact, np.float64)
        error = _ratio(_rms(ours - exact), max(_rms(theirs - exact), ROUNDING * _rms(exact)))
    return Measurement(quantity, name, largest, relative, error, budgets.limits[quantity])


def _losses(
    quantity: Quantity, name: str, ours: Any, theirs: Any, exact: Any, budgets: Budgets
) -> Measurement:
    mine, found = np.asarray(ours), np.asarray(theirs)
    gap = np.abs(mine - found)
    relative = float((gap / np.abs(found)).max())
    error = relative
    if exact is not None:
        true = np.asarray(exact)
        noise = max(float(np.abs(found - true).max()), ROUNDING * float(np.abs(true).max()))
        error = _ratio(float(np.abs(mine - true).max()), noise)
    return Measurement(quantity, name, float(gap.max()), relative, error, budgets.limits[quantity])


def _ratio(value: float, scale: float) -> float:
    return 0.0 if value == 0.0 else value / scale if scale else float("inf")


def _rms(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if values.size else 0.0


def _same(left: np.ndarray, right: np.ndarray) -> bool:
    return left.dtype == right.dtype and left.tobytes() == right.tobytes()


def _rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    return array.astype(jnp.dtype(dtype)).astype(array.dtype)
