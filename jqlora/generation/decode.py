"""The compiled parts of generation: a prefill, a single step, and a loop of steps.

Shapes are static and the loop ends early once every row has ended. Each part is compiled once for
each (program, shapes); a program is equal to another if it binds the same function.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import struct

from jqlora.generation.sampling import Sampling, process
from jqlora.types import Variables

Apply: TypeAlias = Callable[..., Any]


@dataclass(frozen=True)
class Program:
    """What is static in a generation.

    An encoder-decoder begins with ``start``, None for other models; ``forced`` are pairs of a place
    among the new tokens and the token that must stand there.
    """

    apply: Apply
    model: Any
    sampling: Sampling
    slots: int
    start: int | None = None
    forced: tuple[tuple[int, int], ...] = ()


@struct.dataclass
class State:
    """What a decoding step reads and writes; which tokens end a row is data, not a program."""

    cache: Any
    token: jax.Array  # int32 [B]: the newest token, not in the cache yet
    seen: jax.Array  # bool [B, V]
    ended: jax.Array  # bool [B]
    key: jax.Array
    step: jax.Array  # int32 []: how many tokens have been chosen
    eos_ids: jax.Array  # int32 [E]; unused places hold -1
    pad_id: jax.Array  # int32 []


def choose(program: Program, logits: jax.Array, state: State) -> State:
    """The state with the next token chosen from logits [B, V]."""
    scores = process(logits.astype(jnp.float32), state.seen, program.sampling)
    if program.sampling.temperature > 0:
        key = jax.random.fold_in(state.key, state.step)
        token = jax.random.categorical(key, scores, axis=-1)
    else:
        token = jnp.argmax(scores, axis=-1)
    token = token.astype(jnp.int32)
    for place, forced in program.forced:
        token = jnp.where(state.step == place, jnp.int32(forced), token)
    token = jnp.where(state.ended, state.pad_id, token)
    ends = jnp.isin(token, state.eos_ids)
    rows = jnp.arange(token.shape[0])
    return replace(
        state,
        token=token,
        seen=state.seen.at[rows, token].set(True),
        ended=state.ended | ends,
        step=state.step + 1,
    )


@partial(jax.jit, static_argnums=0)
def prefill(
    program: Program,
    variables: Variables,
    ids: jax.Array,
    mask: jax.Array,
    key: jax.Array,
    eos_ids: jax.Array,
    pad_id: jax.Array,
) -> State:
    """The state after prompts int32 [B, T] and the choice of the first new token.

    What was seen by an encoder does not count as seen.
    """
    batch = ids.shape[0]
    cache = program.model.init_cache(batch, program.slots)
    if program.start is None:
        out = program.apply(variables, ids, attention_mask=mask, cache=cache, logits_to_keep=1)
    else:
        begun = jnp.full((batch, 1), program.start, jnp.int32)
        out = program.apply(
            variables, ids, attention_mask=mask, decoder_input_ids=begun, cache=cache
        )
        ids, mask = begun, jnp.ones_like(begun)
    logits = out.logits[:, -1]
    seen = jnp.zeros(logits.shape, bool).at[jnp.arange(batch)[:, None], ids].max(mask.astype(bool))
    state = State(
        cache=out.cache,
        token=jnp.zeros((batch,), jnp.int32),
        seen=seen,
        ended=jnp.zeros((batch,), bool),
        key=key,
        step=jnp.int32(0),
        eos_ids=eos_ids,
        pad_id=pad_id,
    )
    return choose(program, logits, state)


def advance(program: Program, variables: Variables, state: State) -> State:
    """The state one token on."""
    tokens = state.token[:, None]
    if program.start is None:
        out = program.apply(variables, tokens, cache=state.cache)
    else:
        out = program.apply(variables, None, decoder_input_ids=tokens, cache=state.cache)
    return choose(program, out.logits[:, -1], replace(state, cache=out.cache))


advance_once = jax.jit(advance, static_argnums=0, donate_argnums=2)
"""One compiled :func:`advance` whose cache is updated in place."""


@partial(jax.jit, static_argnums=(0, 3))
def decode(program: Program, variables: Variables, state: State, count: int) -> jax.Array:
    """Tokens int32 [B, count], the one that ``state`` holds first; stops once all rows ended."""
    tokens = jnp.full((state.token.shape[0], count), state.pad_id, jnp.int32)

    def unfinished(loop: tuple[State, jax.Array]) -> jax.Array:
        return (loop[0].step < count) & ~jnp.all(loop[0].ended)

    def body(loop: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        state = advance(program, variables, loop[0])
        column = state.token[:, None]
        return state, jax.lax.dynamic_update_slice(loop[1], column, (0, state.step - 1))

    return jax.lax.while_loop(unfinished, body, (state, tokens.at[:, 0].set(state.token)))[1]
