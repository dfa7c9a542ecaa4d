"""The decoder against transformers, live, on tiny random checkpoints of every variant."""

import copy
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from jqlora.models.outputs import CausalLMOutput  # noqa: E402
from tests.models import variants  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("compile_quickly"),
    pytest.mark.parity,
]
every_variant = pytest.mark.parametrize("name", variants.ROWS)
LIMIT = 1e-4  # of the logits' range, in float32
# where the frequencies of a whole batch follow its longest sequence, once that is longer than this
SWITCH = {"llama_dynamic_rope": 8, "phi3_longrope": 10}


BATCH, LENGTH = 3, 14  # one shape for all, so that each variant compiles once
CACHED = 2 * LENGTH


class Ways(NamedTuple):
    """What a model returns for the same ids, called in every way."""

    plain: CausalLMOutput
    masked: CausalLMOutput
    packed: CausalLMOutput
    prefilled: CausalLMOutput
    decoded: CausalLMOutput


@functools.cache
def compiled(model):
    """All ways of calling in one program: what they have in common is compiled once."""

    @jax.jit
    def apply(params, ids, mask, segments, cache):
        call = functools.partial(model.apply, {"params": params})
        last, real = ids[:, -1:], mask[:, -1:]
        return Ways(
            call(ids, output_hidden_states=True),
            call(ids, attention_mask=mask),
            call(ids, segment_ids=segments),
            call(ids, attention_mask=mask, cache=cache),
            call(last, attention_mask=real, cache=cache),
        )

    return apply


def run(checkpoint, ids, *, mask=None, segments=None, cache=None):
    """What is not given is all ones, and an empty cache; ``decoded`` is the last token alone."""
    ones = np.ones(ids.shape, np.int32)
    mask, segments = (ones if given is None else given for given in (mask, segments))
    cache = checkpoint.model.init_cache(BATCH, CACHED) if cache is None else cache
    return compiled(checkpoint.model)(checkpoint.params, ids, mask, segments, cache)


def left_padded(real: list[int], length: int) -> np.ndarray:
    return np.stack([np.arange(length) >= length - n for n in real]).astype(np.int32)


@every_variant
def test_logits_and_every_hidden_state_equal_transformers(name):
    checkpoint = variants.checkpoint(name)
    ids = variants.ids(BATCH, LENGTH)
    theirs = variants.hf_run(fresh_rope(checkpoint.hf), ids)
    ours = run(checkpoint, ids).plain
    assert variants.gap(ours.logits, theirs.logits) < LIMIT
    assert len(theirs.hidden_states) == len(ours.hidden_states)
    for mine, hidden in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert variants.gap(mine, hidden) < LIMIT


@every_variant
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_equal_transformers_at_real_tokens(name, side):
    checkpoint = variants.checkpoint(name)
    ids, mask = variants.ids(BATCH, LENGTH), left_padded([LENGTH, 7, 2], LENGTH)
    if side == "right":
        mask = mask[:, ::-1].copy()
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    theirs = variants.hf_run(
        fresh_rope(checkpoint.hf), ids, attention_mask=mask, position_ids=positions
    )
    ours = run(checkpoint, ids, mask=mask).masked
    real = mask.astype(bool)
    assert variants.gap(np.asarray(ours.logits)[real], theirs.logits.numpy()[real]) < LIMIT
    assert np.isfinite(ours.logits).all()


@every_variant
def test_packed_sequences_do_not_see_each_other(name):
    checkpoint = variants.checkpoint(name)
    ids = variants.ids(BATCH, LENGTH)
    segments = np.array([[1] * 6 + [2] * 5 + [3] + [0] * 2, [4] * LENGTH, [0] * 3 + [1] * 11])
    packed = np.asarray(run(checkpoint, ids, segments=segments.astype(np.int32)).packed.logits)
    for row, segment in ((0, 1), (0, 2), (0, 3), (1, 4), (2, 1)):
        inside = segments[row] == segment
        theirs = variants.hf_run(fresh_rope(checkpoint.hf), ids[row : row + 1, inside])
        if name in SWITCH and inside.sum() < LENGTH:
            continue
        assert variants.gap(packed[row, inside], theirs.logits[0]) < LIMIT


@every_variant
def test_changing_one_packed_sequence_leaves_its_neighbours_bit_identical(name):
    checkpoint = variants.checkpoint(name)
    ids = variants.ids(BATCH, LENGTH)
    segments = np.tile(np.array([[1] * 6 + [2] * 5 + [3] * 3], np.int32), (BATCH, 1))
    before = np.asarray(run(checkpoint, ids, segments=segments).packed.logits)
    ids[segments == 2] = 3
    after = np.asarray(run(checkpoint, ids, segments=segments).packed.logits)
    np.testing.assert_array_equal(after[segments != 2], before[segments != 2])
    assert (after[segments == 2] != before[segments == 2]).any()


@every_variant
def test_decoding_with_a_cache_equals_the_whole_sequence(name):
    checkpoint = variants.checkpoint(name)
    ids, mask = variants.ids(BATCH, LENGTH), left_padded([LENGTH, 11, 7], LENGTH)
    if name in SWITCH:  # keys in the cache would keep the frequencies of a shorter sequence
        mask = left_padded([SWITCH[name], 7, 5], LENGTH)
    whole = np.asarray(run(checkpoint, ids, mask=mask).masked.logits)
    # the first nine columns stand behind padding, so that this call has the shape of all others
    behind = [np.concatenate([np.zeros_like(a[:, 9:]), a[:, :9]], 1) for a in (ids, mask)]
    out = run(checkpoint, behind[0], mask=behind[1]).prefilled
    parts = [out.logits[:, LENGTH - 9 :]]
    for i in range(9, LENGTH):
        last, real = (np.tile(a[:, i : i + 1], LENGTH) for a in (ids, mask))
        out = run(checkpoint, last, mask=real, cache=out.cache).decoded
        parts.append(out.logits)
    assert int(out.cache.length) == LENGTH + LENGTH - 9
    real = mask.astype(bool)
    assert variants.gap(np.concatenate(parts, 1)[real], whole[real]) < LIMIT


@every_variant
def test_bf16_strays_from_float32_no_further_than_transformers_does(name):
    """Both round the same weights and activations to 8 bits; the budget is transformers' own error.

    The slack of a quarter covers chance: two roundings of one size rarely agree better.
    """
    checkpoint = variants.checkpoint(name)
    ids = variants.ids(BATCH, LENGTH)
    exact = variants.hf_run(fresh_rope(checkpoint.hf), ids).logits.numpy()
    rounded = copy.deepcopy(checkpoint.hf).bfloat16()
    theirs = variants.hf_run(fresh_rope(rounded), ids).logits.float().numpy()
    params = jax.tree.map(lambda w: np.asarray(w).astype(jnp.bfloat16), checkpoint.params)
    model = checkpoint.model.clone(dtype=jnp.bfloat16)
    ours = jax.jit(model.apply)({"params": params}, ids)
    assert ours.logits.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(ours.logits, np.float32) - exact)
    assert error < 1.25 * np.linalg.norm(theirs - exact)


def fresh_rope(hf):
    """The model with transformers' memory of earlier sequence lengths (dynamic NTK) erased."""
    if hasattr(hf.base_model, "rotary_emb"):
        rotary = hf.base_model.rotary_emb
        hf.base_model.rotary_emb = type(rotary)(hf.config)
    return hf
