"""What is asked of a generation, checked and laid out for the compiled programs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jqlora.errors import ConfigError
from jqlora.generation.decode import Apply, Program, State, prefill
from jqlora.generation.sampling import Sampling
from jqlora.graft import CONSTANTS
from jqlora.methods.by_row import ADAPTER_IDS
from jqlora.types import Variables

SMALLEST_BUCKET = 32
EOS_PLACES = 4  # up to so many end tokens share a program


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for beside the prompts; the fields are the keywords of ``generate``."""

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
        room = max(SMALLEST_BUCKET, 1 << (ids.shape[1] - 1).bit_length())
        if self.model.task == "seq2seq-lm":
            # behind the prompt, where it moves no token
            sides = (0, min(room, self.model.config.longest) - ids.shape[1])
            program = self._encoder_decoder(apply)
        else:
            sides = (room - ids.shape[1], 0)
            slots = room + self.max_new_tokens
            program = Program(apply=apply, model=self.model, sampling=self.sampling, slots=slots)
        state = prefill(
            program,
            variables,
            np.pad(ids, ((0, 0), sides)),
            np.pad(mask, ((0, 0), sides)),
            jax.random.key(0) if self.key is None else self.key,  # greedy never reads it
            np.array([*self.eos_ids, *[-1] * (EOS_PLACES - len(self.eos_ids))], np.int32),
            np.int32(self._pad_id()),
        )
        return program, state

    def _encoder_decoder(self, apply: Apply) -> Program:
        config = self.model.config
        start = config.decoder_start_token_id
        start = config.bos_token_id if start is None else start
        if start is None:
            raise ConfigError("the model's config has no decoder_start_token_id to start with")
        places = ((0, config.forced_bos_token_id), (-1, config.forced_eos_token_id))
        return Program(
            apply=apply,
            model=self.model,
            sampling=self.sampling,
            slots=self.max_new_tokens,  # the last new token is never read, but the start is
            start=start,
            forced=tuple((i % self.max_new_tokens, t) for i, t in places if t is not None),
        )

    def _pad_id(self) -> int:
        ours = self.model.config.pad_token_id if self.model.task == "seq2seq-lm" else None
        found = (self.pad_id, ours, *self.eos_ids)
        return next((token for token in found if token is not None), 0)

    def _check(self, ids: np.ndarray, mask: np.ndarray) -> None:
        if ids.ndim != 2 or ids.shape != mask.shape or ids.shape[1] == 0:
            raise ConfigError(
                f"input_ids {ids.shape} and attention_mask {mask.shape} must be one shape [B, T], "
                "T > 0"
            )
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.sampling.temperature > 0 and self.key is None:
            raise ConfigError(f"temperature={self.sampling.temperature} samples: give a key")
        if self.model.task == "seq2seq-lm":
            self._check_encoder_decoder(ids)
        else:
            self._check_causal(mask)

    def _check_encoder_decoder(self, ids: np.ndarray) -> None:
        longest = self.model.config.longest
        for what, count in (
            (f"a prompt of {ids.shape[1]} tokens", ids.shape[1]),
            (f"max_new_tokens={self.max_new_tokens}", self.max_new_tokens),
        ):
            if count > longest:
                raise ConfigError(f"{what} exceeds the model's {longest} positions")

    def _check_causal(self, mask: np.ndarray) -> None:
        if not mask[:, -1].all():
            raise ConfigError("prompts must be padded on the left: a row ends in padding")
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


def served_by(variables: Variables, adapter_ids: Any, *, rows: int) -> dict[str, Any]:
    """``variables`` of a stack of adapters with the one that serves each row.

    Raises ConfigError where there is no stack, or the numbers are not those of its adapters.
    """
    ids = np.asarray(adapter_ids)
    if CONSTANTS not in variables:
        raise ConfigError("adapter_ids needs several adapters: give what jq.stack makes of them")
    count = len(jax.tree.leaves(variables[CONSTANTS])[0])
    known = ids.dtype.kind == "i" and ids.shape == (rows,) and ((ids >= -1) & (ids < count)).all()
    if not known:
        raise ConfigError(
            f"adapter_ids={ids.tolist()}: give one whole number for each of the {rows} rows, "
            f"0 to {count - 1} for an adapter, -1 for none"
        )
    return {**variables, ADAPTER_IDS: ids.astype(np.int32)}
