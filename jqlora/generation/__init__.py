"""Text generation with a KV cache: one compiled prefill and one compiled loop.

Prompts are padded to the next power of two, so that prompts of all lengths share a few programs.
Pass the same bound function each time: a new one is compiled anew.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jqlora.generation.decode import Apply, advance_once, decode
from jqlora.generation.request import Request, served_by
from jqlora.generation.sampling import Sampling
from jqlora.types import Variables

__all__ = ["Sampling", "generate", "stream"]


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
    adapter_ids: Any = None,
) -> jax.Array:
    """New tokens int32 [B, max_new_tokens]; after a row's first end token come ``pad_id``.

    ``apply`` is ``jq.bind(model, plan)``; prompts int32 [B, T] are padded on the left where
    ``attention_mask`` is 0. ``eos_ids`` end a row; ``pad_id`` defaults to the first of them, else
    0. ``temperature`` 0 is greedy, else ``key`` is needed. Raises ConfigError on right padding, on
    values out of range, and where prompt and new tokens exceed the model's positions or cross the
    length at which LongRoPE switches (Phi-3).

    An encoder-decoder reads ``input_ids``, padded on either side, with its encoder, once, and
    writes behind ``decoder_start_token_id``. First and last token are those that its config forces,
    if any, and ``pad_id`` defaults to the config's. There is no beam search.

    With the plan and adapters of ``jq.stack``, ``adapter_ids`` int32 [B] says which of them serves
    each row; -1 is none, the base alone. Rows do not see each other.
    """
    if adapter_ids is not None:
        variables = served_by(variables, adapter_ids, rows=len(input_ids))
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
