"""The decoder against transformers, live, on tiny random checkpoints of every variant."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.models import variants  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("compile_quickly"),
    pytest.mark.parity,
]
every_variant = pytest.mark.parametrize("name", variants.ROWS)
LIMIT = 1e-4  # of the logits' range, in float32
# where the frequencies of a whole batch follow its longest sequence, once that is longer than this
SWITCH = {"llama_dynamic_rope": 8, "phi3_longrope": 10}


BATCH, LENGTH = 3, 14  # one shape for all, so that each way of calling compiles once


@functools.cache
def compiled(model, names, output_hidden_states):
    @jax.jit
    def apply(params, ids, *values):
        options = dict(zip(names, values, strict=True))
        return model.apply(
            {"params": params}, ids, output_hidden_states=output_hidden_states, **options
        )

    return apply


def run(checkpoint, ids, *, output_hidden_states=False, **options):
    apply = compiled(checkpoint.model, tuple(options), output_hidden_states)
    values = [jax.tree.map(jnp.asarray, value) for value in options.values()]
    return apply(checkpoint.params, jnp.asarray(ids), *values)


def left_padded(real: list[int], length: int) -> np.ndarray:
    return np.stack([np.arange(length) >= length - n for n in real]).astype(np.int32)


@every_variant
def test_logits_and_every_hidden_state_equal_transformers(name):
    checkpoint = variants.checkpoint(name)
    ids = variants.ids(BATCH, LENGTH)
    theirs = variants.hf_run(fresh_rope(checkpoint.hf), ids)
    ours = run(checkpoint, ids, output_hidden_states=True)
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
    ours = run(checkpoint, ids, attention_mask=mask)
    real = mask.astype(bool)
    assert variants.gap(np.asarray(ours.logits)[real], theirs.logits.numpy()[real]) < LIMIT
    assert np.isfinite(ours.logits).all()


@every_variant
def test_packed_sequences_do_not_see_each_other(name):
    checkpoint = variants.checkpoint(name)
    ids = variants.ids(BATCH, LENGTH)
    segments = np.array([[1] * 6 + [2] * 5 + [3] + [0] * 2, [4] * LENGTH, [0] * 3 + [1] * 11])
    packed = np.asarray(run(checkpoint, ids, segment_ids=segments.astype(np.int32)).logits)
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
    before = np.asarray(run(checkpoint, ids, segment_ids=segments).logits)
    ids[segments == 2] = 3
    after = np.asarray(run(checkpoint, ids, segment_ids=segments).logits)
    np.testing.assert_array_equal(after[segments != 2], before[segments != 2])
    assert (after[segments == 2] != before[segments == 2]).any()


@every_variant
def test_decoding_with_a_cache_equals_the_whole_sequence(name):
    checkpoint = variants.checkpoint(name)
    ids, mask = variants.ids(BATCH, LENGTH), left_padded([LENGTH, 11, 7], LENGTH)
    if name in SWITCH:  # keys in the cache would keep the frequencies of a shorter sequence
        mask = left_padded([SWITCH[name], 7, 5], LENGTH)
    whole = np.asarray(run(checkpoint, ids, attention_mask=mask).logits)
    cache = checkpoint.model.init_cache(BATCH, LENGTH + 3)
    parts = []
    for start, stop in ((0, 9), *((i, i + 1) for i in range(9, LENGTH))):
        chunk = mask[:, start:stop]
        out = run(checkpoint, ids[:, start:stop], attention_mask=chunk, cache=cache)
        parts.append(out.logits)
        cache = out.cache
    assert int(cache.length) == LENGTH
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
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), checkpoint.params)
    model = checkpoint.model.clone(dtype=jnp.bfloat16)
    ours = run(checkpoint._replace(model=model, params=params), ids)
    assert ours.logits.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(ours.logits, np.float32) - exact)
    assert error < 1.25 * np.linalg.norm(theirs - exact)


def fresh_rope(hf):
    """The model with transformers' memory of earlier sequence lengths (dynamic NTK) erased."""
    if hasattr(hf.base_model, "rotary_emb"):
        rotary = hf.base_model.rotary_emb
        hf.base_model.rotary_emb = type(rotary)(hf.config)
    return hf
