"""Log-likelihoods of texts that go on after a prompt, of a causal language model.

The tokens of a continuation are those that prompt and continuation together have more than the
prompt alone, as EleutherAI's harness defines them. Continuations that are given the same tokens
(the single tokens of letters) share a row, so that a question is computed once and not once for
each letter.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jqlora.data.tokenize import plain_ids
from jqlora.tasks.batches import padded_length
from jqlora.types import Variables


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt with its continuations, all int32 [n]."""

    prompt: np.ndarray
    continuations: tuple[np.ndarray, ...]

    @property
    def longest(self) -> int:
        """The most tokens that the model is given for one of them."""
        return len(self.prompt) + max(map(len, self.continuations)) - 1


def encode_asked(prompt: str, continuations: Sequence[str], tokenizer: Any) -> Asked:
    """Tokens of a prompt and of each continuation after a space."""
    known = plain_ids(prompt, tokenizer)
    after = [plain_ids(f"{prompt} {text}", tokenizer)[len(known) :] for text in continuations]
    return Asked(known, tuple(after))


def make_likelihood(
    apply: Callable[..., Any], *, rows: int, length: int
) -> Callable[[Variables, Sequence[Asked]], list[np.ndarray]]:
    """``likelihoods(variables, asked)``: for each an fp32 array [continuations] of sums of
    log-probabilities. ``rows`` are computed at once, none longer than ``length``."""

    @jax.jit
    def step(variables: Variables, batch: Mapping[str, Any]) -> jax.Array:
        inputs = {name: batch[name] for name in ("positions", "segment_ids")}
        logits = apply(variables, batch["input_ids"], **inputs).logits
        logits = jnp.take_along_axis(logits, batch["at"][:, :, None], axis=1)
        logits = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        found = jnp.take_along_axis(logits, batch["targets"], axis=2)
        return jnp.where(batch["counted"][:, :, None], found, 0.0).sum(1)

    def likelihoods(variables: Variables, asked: Sequence[Asked]) -> list[np.ndarray]:
        shared = _rows(asked)
        width = max(len(row.targets) for row in shared)
        result = [np.zeros(len(one.continuations), np.float32) for one in asked]
        for start in range(0, len(shared), rows):
            chunk = shared[start : start + rows]
            found = np.asarray(step(variables, _batch(chunk, rows, length, width)))
            for row, values in zip(chunk, found, strict=False):
                for value, (item, choice) in zip(values, row.owners, strict=False):
                    result[item][choice] = value
        return result

    return likelihoods


@dataclasses.dataclass(frozen=True)
class _Row:
    """``targets`` are continuations of one length after the same ``given`` tokens; ``owners`` say
    whose."""

    given: np.ndarray
    targets: list[np.ndarray]
    owners: list[tuple[int, int]]


def _rows(asked: Sequence[Asked]) -> list[_Row]:
    shared: dict[tuple[bytes, int], _Row] = {}
    for item, one in enumerate(asked):
        for choice, after in enumerate(one.continuations):
            given = np.concatenate([one.prompt, after[:-1]])
            row = shared.setdefault((given.tobytes(), len(after)), _Row(given, [], []))
            row.targets.append(after)
            row.owners.append((item, choice))
    return sorted(shared.values(), key=lambda row: len(row.given))


def _batch(chunk: Sequence[_Row], rows: int, length: int, width: int) -> dict[str, np.ndarray]:
    """Arrays for a chunk of rows, filled up to ``rows`` with copies of the first."""
    members = [*chunk, *[chunk[0]] * (rows - len(chunk))]
    longest = padded_length(max(len(row.given) for row in members), length)
    after = padded_length(max(len(row.targets[0]) for row in members), longest, shortest=1)
    names = {"input_ids": longest, "segment_ids": longest, "positions": longest, "at": after}
    batch: dict[str, np.ndarray] = {
        name: np.zeros((rows, size), np.int32) for name, size in names.items()
    }
    batch["targets"] = np.zeros((rows, after, width), np.int32)
    batch["counted"] = np.zeros((rows, after), np.bool_)
    for i, row in enumerate(members):
        size, count = len(row.given), len(row.targets[0])
        batch["input_ids"][i, :size] = row.given
        batch["segment_ids"][i, :size] = 1
        batch["positions"][i, :size] = np.arange(size)
        batch["at"][i, :count] = np.arange(size - count, size)
        batch["counted"][i, :count] = True
        for j, target in enumerate(row.targets):
            batch["targets"][i, :count, j] = target
    return batch
