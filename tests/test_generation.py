"""Generation: what the compiled loop yields, and its scores, against transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.errors import ConfigError
from jqlora.generation import Sampling, generate, stream
from jqlora.generation.sampling import process
from jqlora.models import family_of
from jqlora.tree import flatten, unflatten
from tests.draws import draws
from tests.models.variants import ROWS, TINY, checkpoint, hf_run

pytestmark = pytest.mark.usefixtures("compile_quickly")

PAD, EOS = 0, 2


@functools.cache
def toy(name="mistral_window"):
    """A tiny random model of its own, bound, with weights that make its choices distinct."""
    row = TINY | ROWS[name]
    model = family_of(row).build(family_of(row).parse(row))
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = flatten(jax.eval_shape(model.init, jax.random.key(0), ids)["params"])
    draw = draws(1)
    params = unflatten(
        {
            path: np.ones(leaf.shape, np.float32) if path[-1] == "scale" else draw(leaf.shape, 0.25)
            for path, leaf in shapes.items()
        }
    )
    return model, bound(model), {"params": params}


@functools.cache
def bound(model):
    return lambda variables, *args, **kwargs: model.apply(variables, *args, **kwargs)


def prompts(*lengths, seed=0):
    """Left-padded prompts int32 [B, T] and their mask."""
    rng, longest = np.random.default_rng(seed), max(lengths)
    ids = rng.integers(3, TINY["vocab_size"], (len(lengths), longest)).astype(np.int32)
    mask = (np.arange(longest) >= longest - np.array(lengths)[:, None]).astype(np.int32)
    return np.where(mask, ids, PAD), mask


def hf_generate(hf, ids, mask, count, **options):
    torch = pytest.importorskip("torch")
    out = hf.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=PAD,
        **options,
    ).numpy()[:, ids.shape[1] :]
    return np.pad(out, ((0, 0), (0, count - out.shape[1])), constant_values=PAD)


@pytest.mark.parity
@pytest.mark.parametrize(
    "name",
    [
        "llama3_gqa_scaled",
        "mistral_window",
        "qwen2_layer_types",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3",
        "gpt2_scaled_by_layer",
    ],
)
def test_greedy_tokens_equal_transformers_in_a_left_padded_batch(name):
    hf, _, model, params = checkpoint(name)
    ids, mask = prompts(9, 4, 1)
    # an id that greedy decoding really reaches in one row ends it early
    free = hf_generate(hf, ids, mask, 20, eos_token_id=None)
    ends = [int(free[0, 6]), int(free[1, 11])]
    for eos in ([], ends):
        theirs = hf_generate(hf, ids, mask, 20, eos_token_id=eos or None)
        ours = generate(
            bound(model),
            {"params": params},
            ids,
            mask,
            model=model,
            max_new_tokens=20,
            eos_ids=eos,
            pad_id=PAD,
        )
        assert ours.dtype == jnp.int32
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parity
@pytest.mark.parametrize(("lengths", "count"), [((7, 3), 4), ((13, 4), 8)])
def test_longrope_serves_sequences_on_either_side_of_its_switch(lengths, count):
    hf, _, model, params = checkpoint("phi3_longrope")
    ids, mask = prompts(*lengths)
    theirs = hf_generate(hf, ids, mask, count, eos_token_id=None)
    ours = generate(bound(model), {"params": params}, ids, mask, model=model, max_new_tokens=count)
    np.testing.assert_array_equal(ours, theirs)


def test_generation_across_the_switch_of_longrope_is_refused():
    model, apply, variables = toy("phi3_longrope")
    with pytest.raises(ConfigError, match=r"beyond 10 tokens.*at most 4 new tokens.*prompt of 7"):
        generate(apply, variables, prompts(7)[0], model=model, max_new_tokens=5)


@pytest.mark.parity
def test_a_repetition_penalty_changes_greedy_tokens_as_in_transformers():
    hf, _, model, params = checkpoint("smollm2_tied")
    ids, mask = prompts(8, 8)  # transformers counts padding as seen, we do not
    options = {"model": model, "max_new_tokens": 16, "repetition_penalty": 1.7}
    theirs = hf_generate(hf, ids, mask, 16, repetition_penalty=1.7, eos_token_id=None)
    ours = generate(bound(model), {"params": params}, ids, mask, **options)
    np.testing.assert_array_equal(ours, theirs)
    plain = generate(bound(model), {"params": params}, ids, mask, model=model, max_new_tokens=16)
    assert (np.asarray(plain) != np.asarray(ours)).any()


@pytest.mark.parity
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.0, top_k=5),
        Sampling(temperature=1.0, top_k=1000),
        Sampling(temperature=1.3, top_p=0.6),
        Sampling(temperature=1.0, top_p=1e-6),
        Sampling(temperature=0.5, top_k=20, top_p=0.9, repetition_penalty=1.4),
        Sampling(repetition_penalty=0.8),
    ],
    ids=str,
)
def test_scores_equal_those_of_the_processors_of_transformers(sampling):
    torch = pytest.importorskip("torch")
    from transformers import generation as hf

    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (6, 97)).astype(np.float32)
    logits[0, 3:9] = logits[0].max()  # ties at the top
    history = rng.integers(0, 97, (6, 12))
    scores = torch.tensor(logits)
    chain = []
    if sampling.repetition_penalty != 1:
        chain.append(hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature > 0:
        chain.append(hf.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chain.append(hf.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(hf.TopPLogitsWarper(sampling.top_p))
    for processor in chain:
        scores = processor(torch.tensor(history), scores)
    seen = np.zeros((6, 97), bool)
    seen[np.arange(6)[:, None], history] = True
    ours = np.asarray(process(jnp.asarray(logits), jnp.asarray(seen), sampling))
    # which of tied tokens survives at the edge of a nucleus is arbitrary: compare sorted
    np.testing.assert_allclose(np.sort(ours), np.sort(scores.numpy()), rtol=1e-6)
    np.testing.assert_allclose(ours[1:], scores.numpy()[1:], rtol=1e-6)


@functools.cache
def sampled(key, rows=1000):
    """Four tokens int32 [rows, 4] after one prompt, each of the six likeliest."""
    model, apply, variables = toy()
    sampling = {"temperature": 1.5, "top_k": 6}
    ids, mask = (np.repeat(array, rows, 0) for array in prompts(5))
    options = {"model": model, "max_new_tokens": 4, "key": jax.random.key(key)}
    return np.asarray(generate(apply, variables, ids, mask, **options, **sampling))


def test_sampled_tokens_follow_the_softmax_of_the_scores():
    model, _, variables = toy()
    tokens = sampled(3)
    logits = jax.jit(model.apply)(variables, prompts(5)[0]).logits[:, -1]
    scores = process(logits, jnp.zeros(logits.shape, bool), Sampling(temperature=1.5, top_k=6))
    expected = np.asarray(jax.nn.softmax(scores))[0]
    rows = len(tokens)
    found = np.bincount(tokens[:, 0], minlength=expected.size) / rows
    assert not found[expected == 0].any()
    # five standard deviations of a frequency
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / rows)).all()


def test_sampling_is_decided_by_its_key():
    np.testing.assert_array_equal(sampled(0), sampled.__wrapped__(0))
    assert (sampled(0) != sampled(1)).any()


def test_rows_do_not_depend_on_their_neighbours_or_the_bucket():
    model, apply, variables = toy()
    ids, mask = prompts(40, 6)  # 40 falls into a larger bucket
    options = {"model": model, "max_new_tokens": 10}
    together = generate(apply, variables, ids, mask, **options)
    alone = generate(apply, variables, ids[1:, -6:], **options)
    np.testing.assert_array_equal(together[1:], alone)


def test_after_its_end_a_row_is_padding():
    model, apply, variables = toy()
    ids, mask = prompts(7, 5)
    options = {"model": model, "max_new_tokens": 14}
    free = np.asarray(generate(apply, variables, ids, mask, **options))
    eos = int(free[0, 4])
    ended = np.asarray(generate(apply, variables, ids, mask, eos_ids=[eos], pad_id=1, **options))
    for row, whole in zip(ended, free, strict=True):
        stop = int(np.argmax(whole == eos)) + 1 if eos in whole else len(whole)
        np.testing.assert_array_equal(row[:stop], whole[:stop])
        assert (row[stop:] == 1).all()
    by_default = np.asarray(generate(apply, variables, ids, mask, eos_ids=[eos], **options))
    assert by_default[0, -1] == eos


def test_a_stream_yields_the_tokens_of_the_loop_and_stops_with_it():
    model, apply, variables = toy()
    ids, mask = prompts(7, 5)
    options = {"model": model, "max_new_tokens": 14}
    whole = np.asarray(generate(apply, variables, ids, mask, **options))
    np.testing.assert_array_equal(
        np.stack(list(stream(apply, variables, ids, mask, **options)), 1), whole
    )
    eos = sorted({int(row[3]) for row in whole})
    streamed = np.stack(list(stream(apply, variables, ids, mask, eos_ids=eos, **options)), 1)
    ended = np.asarray(generate(apply, variables, ids, mask, eos_ids=eos, **options))
    np.testing.assert_array_equal(streamed, ended[:, : streamed.shape[1]])
    assert streamed.shape[1] <= 4


def test_prompts_of_one_bucket_share_their_programs():
    model, _, variables = toy()
    traces = []

    def apply(variables, *args, **kwargs):
        traces.append(None)
        return model.apply(variables, *args, **kwargs)

    for length in (3, 17, 32):
        generate(apply, variables, prompts(length)[0], model=model, max_new_tokens=4)
    first = len(traces)
    assert first <= 3  # one prefill and one loop, whose body may be traced twice
    generate(apply, variables, prompts(33)[0], model=model, max_new_tokens=4)
    assert len(traces) > first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 60}, r"5 tokens and max_new_tokens=60 exceed.*64.*at most 59"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"temperature": 1.0}, "give a key"),
        ({"attention_mask": np.array([[1, 1, 1, 1, 0]])}, "padded on the left"),
        ({"attention_mask": np.ones((1, 4), np.int32)}, r"one shape \[B, T\]"),
        ({"input_ids": np.zeros((1, 0), np.int32)}, "T > 0"),
    ],
)
def test_impossible_requests_say_what_is_accepted(options, message):
    model, apply, variables = toy()
    request = {"input_ids": prompts(5)[0], "max_new_tokens": 4} | options
    with pytest.raises(ConfigError, match=message):
        generate(apply, variables, model=model, **request)


@pytest.mark.parity
def test_a_generation_may_fill_the_positions_to_the_last():
    hf, _, model, params = checkpoint("smollm2_tied")
    ids, _ = prompts(5)
    tokens = generate(bound(model), {"params": params}, ids, model=model, max_new_tokens=59)
    whole = np.concatenate([ids, np.asarray(tokens)], 1)
    logits = hf_run(hf, whole).logits.numpy()
    np.testing.assert_array_equal(logits[0, 4:-1].argmax(-1), whole[0, 5:])
