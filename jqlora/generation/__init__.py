"""Text generation with a KV cache: one compiled prefill and one compiled loop.

Prompts are padded on the left to the next power of two, so that prompts of all lengths share a few
programs. Pass the same bound function each time: a new one is compiled anew.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jqlora.errors import ConfigError
from jqlora.generation.decode import Apply, Program, State, advance_once, decode, prefill
from jqlora.generation.sampling import Sampling
from jqlora.types import Variables

__all__ = ["Sampling", "generate", "stream"]

SMALLEST_BUCKET = 32
EOS_PLACES = 4  # up to so many end tokens share a program


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for beside the prompts; the fields are the keywords of :func:`generate`."""

    model: Any
    max_new_tokens: int
    eos_ids: Sequence[int]
    pad_id: int | None
    sampling: Sampling
    key: jax.Array | None

    def start(
        self, apply: Apply, variables: Variables, input_ids: Any, attention_mask: Any
    ) -> tuple[Program, State]:
        """Checks the request, pads the prompts into their bucket and runs the prefill."""
        ids = np.asarray(input_ids, np.int32)
        mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask, np.int32)
        self._check(ids, mask)
        bucket = max(SMALLEST_BUCKET, 1 << (ids.shape[1] - 1).bit_length())
        left = ((0, 0), (bucket - ids.shape[1], 0))
        pad_id = self.pad_id
        if pad_id is None:
            pad_id = self.eos_ids[0] if self.eos_ids else 0
        slots = bucket + self.max_new_tokens
        program = Program(apply=apply, model=self.model, sampling=self.sampling, slots=slots)
        state = prefill(
            program,
            variables,
            np.pad(ids, left),
            np.pad(mask, left),
            jax.random.key(0) if self.key is None else self.key,  # greedy never reads it
            np.array([*self.eos_ids, *[-1] * (EOS_PLACES - len(self.eos_ids))], np.int32),
            np.int32(pad_id),
        )
        return program, state

    def _check(self, ids: np.ndarray, mask: np.ndarray) -> None:
        if ids.ndim != 2 or ids.shape != mask.shape or ids.shape[1] == 0:
            raise ConfigError(
                f"input_ids {ids.shape} and attention_mask {mask.shape} must be one shape [B, T], "
                "T > 0"
            )
        if not mask[:, -1].all():
            raise ConfigError("prompts must be padded on the left: a row ends in padding")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.sampling.temperature > 0 and self.key is None:
            raise ConfigError(f"temperature={self.sampling.temperature} samples: give a key")
        prompt, longest = int(mask.sum(axis=1).max()), self.model.config.longest
        if prompt + self.max_new_tokens > longest:
            raise ConfigError(
                f"a prompt of {prompt} tokens and max_new_tokens={self.max_new_tokens} exceed the "
                f"model's {longest} positions; shorten the prompt or ask for at most "
                f"{max(longest - prompt, 0)} new tokens"
            )
        switch = self.model.config.switch
        # the last new token is never read, so it may lie beyond
        if switch is not None and prompt <= switch < prompt + self.max_new_tokens - 1:
            raise ConfigError(
                f"LongRoPE turns all keys anew beyond {switch} tokens, which a cache cannot: ask "
                f"for at most {switch - prompt + 1} new tokens after a prompt of {prompt}, or give "
                f"one of more than {switch}"
            )


def generate(
    apply: Apply,
    variables: Variables,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    model: Any,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    pad_id: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """New tokens int32 [B, max_new_tokens]; after a row's first end token come ``pad_id``.

    ``apply`` is ``jq.bind(model, plan)``; prompts int32 [B, T] are padded on the left where
    ``attention_mask`` is 0. ``eos_ids`` end a row; ``pad_id`` defaults to the first of them, else
    0. ``temperature`` 0 is greedy, else ``key`` is needed. Raises ConfigError on right padding, on
    values out of range, and where prompt and new tokens exceed the model's positions or cross the
    length at which LongRoPE switches (Phi-3).
    """
    request = Request(
        model=model,
        max_new_tokens=max_new_tokens,
        eos_ids=eos_ids,
        pad_id=pad_id,
        sampling=Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
        ),
        key=key,
    )
    program, state = request.start(apply, variables, input_ids, attention_mask)
    return decode(program, variables, state, max_new_tokens)


def stream(
    apply: Apply,
    variables: Variables,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    model: Any,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    pad_id: int | None = None,
    sampling: Sampling | None = None,
    key: jax.Array | None = None,
) -> Iterator[np.ndarray]:
    """The tokens of :func:`generate` one step at a time, int32 [B] each, until every row ended.

    Every step runs one compiled program, so the first token comes after the prefill alone.
    """
    request = Request(
        model=model,
        max_new_tokens=max_new_tokens,
        eos_ids=eos_ids,
        pad_id=pad_id,
        sampling=sampling or Sampling(),
        key=key,
    )
    program, state = request.start(apply, variables, input_ids, attention_mask)
    yield np.asarray(state.token)
    for _ in range(max_new_tokens - 1):
        if np.asarray(state.ended).all():
            return
        state = advance_once(program, variables, state)
        yield np.asarray(state.token)
