"""The encoder-decoders against transformers, live, on tiny random checkpoints of every row."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from jqlora.errors import CheckpointError, ConfigError  # noqa: E402
from jqlora.models import family_of, loop_to_scan, scan_to_loop  # noqa: E402
from jqlora.models.t5 import distance_buckets  # noqa: E402
from jqlora.models.t5_model import build_t5  # noqa: E402
from jqlora.train import loss_for  # noqa: E402
from jqlora.tree import flatten, unflatten  # noqa: E402
from tests.models import encoders, seq2seq  # noqa: E402
from tests.models.variants import gap  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("compile_quickly"),
    pytest.mark.parity,
]
every_row = pytest.mark.parametrize("name", seq2seq.ROWS)
one_of_each = pytest.mark.parametrize("name", ["t5_gated_untied", "bart"])
READS = dict(seq2seq.READING)
LIMIT = 1e-5  # of the range of logits or hidden states, in float32


@functools.cache
def compiled(name):
    """One program for a row's head that writes and its head that reads: what stands under them is
    compiled once."""
    rows = {task: seq2seq.checkpoint(name, task) for task in (seq2seq.WRITING, READS[name])}

    @jax.jit
    def apply(params, inputs):
        return {
            task: row.model.apply(
                {"params": params[task]}, **inputs[task], output_hidden_states=True
            )
            for task, row in rows.items()
        }

    writing, reading = rows.values()
    usual = {seq2seq.WRITING: inputs_of(writing)[0], READS[name]: seq2seq.read_batch(reading)}
    return lambda inputs: apply({task: row.params for task, row in rows.items()}, usual | inputs)


def run(name, inputs, task=seq2seq.WRITING):
    return compiled(name)({task: inputs})[task]


def inputs_of(checkpoint, **options):
    """A batch without labels, which the decoder has instead, and the labels."""
    batch = seq2seq.batch(**options)
    labels = batch.pop("labels")
    shifted = seq2seq.decoder_inputs(checkpoint.model.config, labels)
    return batch | {"decoder_input_ids": shifted}, labels


@every_row
def test_logits_loss_and_every_hidden_state_equal_transformers(name, record_property):
    checkpoint = seq2seq.checkpoint(name)
    inputs, labels = inputs_of(checkpoint)
    theirs = seq2seq.run_theirs(checkpoint.hf, **seq2seq.batch())  # it shifts the labels itself
    ours = run(name, inputs)
    assert len(theirs.encoder_hidden_states) == len(ours.encoder_hidden_states)
    assert len(theirs.decoder_hidden_states) == len(ours.decoder_hidden_states)
    real = inputs["attention_mask"].astype(bool)
    pairs = [
        *zip(ours.decoder_hidden_states, theirs.decoder_hidden_states, strict=True),
        *(
            (np.asarray(mine)[real], state.numpy()[real])
            for mine, state in zip(
                ours.encoder_hidden_states, theirs.encoder_hidden_states, strict=True
            )
        ),
    ]
    hidden, logits = max(gap(*pair) for pair in pairs), gap(ours.logits, theirs.logits)
    record_property("hidden", hidden)
    record_property("logits", logits)
    assert max(hidden, logits) < LIMIT

    def apply(variables, *, decoder_input_ids, key, **others):
        np.testing.assert_array_equal(decoder_input_ids, inputs["decoder_input_ids"])
        return ours

    batch = {"input_ids": inputs["input_ids"], "labels": jnp.asarray(labels)}
    total, count = loss_for(checkpoint.model)(apply, {}, batch, None)
    np.testing.assert_allclose(total / count, float(theirs.loss), rtol=1e-6)


@pytest.mark.parametrize(("name", "task"), seq2seq.READING)
def test_heads_that_read_equal_transformers(name, task, record_property):
    checkpoint = seq2seq.checkpoint(name, task)
    inputs = seq2seq.read_batch(checkpoint)
    theirs, ours = encoders.run_theirs(checkpoint, inputs), run(name, inputs, task)
    real = inputs["attention_mask"].astype(bool)
    compared = 0
    for field in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states"):
        states = getattr(ours, field, None)
        if states is not None:
            for mine, state in zip(states, getattr(theirs, field), strict=True):
                assert gap(np.asarray(mine)[real], state.numpy()[real]) < LIMIT, field
                compared += 1
    assert compared >= 3
    mine, found = (encoders.logits_of(output) for output in (ours, theirs))
    by_token = task == encoders.TOKENS
    # an answer's loss compares all tokens, those of padding too
    logits = gap(mine[real], found[real]) if by_token else gap(mine, found)
    record_property("logits", logits)
    assert logits < LIMIT


def test_a_text_without_its_end_has_no_class():
    checkpoint = seq2seq.checkpoint("bart", encoders.SEQUENCE)
    inputs = seq2seq.read_batch(checkpoint)
    inputs["input_ids"][1] = np.where(inputs["input_ids"][1] == 2, 5, inputs["input_ids"][1])
    logits = np.asarray(run("bart", inputs, encoders.SEQUENCE).logits)
    np.testing.assert_array_equal(np.isnan(logits).all(1), [False, True, False])


@every_row
def test_what_stands_at_padding_changes_nothing(name):
    checkpoint = seq2seq.checkpoint(name)
    inputs, _ = inputs_of(checkpoint)
    padding = inputs["attention_mask"] == 0
    other = inputs | {"input_ids": np.where(padding, 7, inputs["input_ids"])}
    before, after = (np.asarray(run(name, i).logits) for i in (inputs, other))
    np.testing.assert_array_equal(after, before)
    assert np.isfinite(after).all()


@pytest.mark.parametrize(("name", "scan"), [("t5_gated_untied", True), ("bart", False)])
def test_decoding_with_a_cache_equals_the_whole_sequence(name, scan):
    checkpoint = seq2seq.checkpoint(name)
    inputs, _ = inputs_of(checkpoint)
    whole = run(name, inputs).logits
    model = checkpoint.model.clone(scan=scan)
    params = checkpoint.params if scan else scan_to_loop(checkpoint.params)
    tokens = inputs["decoder_input_ids"]

    @jax.jit
    def call(params, inputs, tokens, cache):
        options = inputs or {"input_ids": None}
        return model.apply({"params": params}, **options, decoder_input_ids=tokens, cache=cache)

    sources = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    out = call(params, sources, tokens[:, :3], model.init_cache(3, 12))
    parts = [out.logits]
    # the encoder has been read once and for all
    params = unflatten(
        {
            path: np.full_like(leaf, np.nan) if "encoder" in path else leaf
            for path, leaf in flatten(params).items()
        }
    )
    for t in range(3, tokens.shape[1]):
        out = call(params, None, tokens[:, t : t + 1], out.cache)
        parts.append(out.logits)
    assert int(out.cache.decoder.length) == tokens.shape[1]
    assert gap(np.concatenate(parts, 1), whole) < LIMIT


def test_a_call_without_the_encoders_ids_needs_a_cache_of_them():
    model, params = seq2seq.checkpoint("t5")[2:]
    ids = np.ones((1, 2), np.int32)
    for cache in (None, model.init_cache(1, 4)):
        with pytest.raises(ValueError, match="a cache that has seen them"):
            model.apply({"params": params}, None, decoder_input_ids=ids, cache=cache)


@one_of_each
def test_bf16_strays_from_float32_no_further_than_transformers_does(name):
    """The budget is transformers' own error; the slack of a quarter covers chance."""
    checkpoint = seq2seq.checkpoint(name)
    inputs, _ = inputs_of(checkpoint, rows=6)
    exact = seq2seq.run_theirs(checkpoint.hf, **inputs).logits.numpy()
    rounded = copy.deepcopy(checkpoint.hf).bfloat16()
    theirs = seq2seq.run_theirs(rounded, **inputs).logits.float().numpy()
    params = jax.tree.map(lambda w: np.asarray(w).astype(jnp.bfloat16), checkpoint.params)
    model = checkpoint.model.clone(dtype=jnp.bfloat16)
    ours = jax.jit(model.apply)({"params": params}, **inputs).logits
    assert ours.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(ours, np.float32) - exact)
    assert error < 1.25 * np.linalg.norm(theirs - exact)


def test_loops_and_recomputation_change_neither_values_nor_gradients():
    checkpoint = seq2seq.checkpoint("t5_gated_untied", num_layers=2)
    inputs, _ = inputs_of(checkpoint)

    def value_and_gradient(model, params):
        def loss(params):
            return jnp.mean(jnp.square(model.apply({"params": params}, **inputs).logits))

        return jax.value_and_grad(loss)(params)

    model = checkpoint.model
    ways = (model.clone(remat="full"), model.clone(scan=False, remat="dots"))

    @jax.jit
    def both(*params):  # one program: what the ways have in common is compiled once
        return [value_and_gradient(*way) for way in zip(ways, params, strict=True)]

    (value, gradient), (other, leaves) = both(checkpoint.params, scan_to_loop(checkpoint.params))
    np.testing.assert_allclose(other, value, rtol=1e-5)
    leaves = flatten(jax.tree.map(np.asarray, loop_to_scan(leaves)))
    for path, leaf in flatten(jax.tree.map(np.asarray, gradient)).items():
        assert np.abs(leaves[path] - leaf).max() <= 1e-5 * np.abs(leaf).max(), path


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize(("count", "longest"), [(32, 128), (8, 10), (6, 40), (64, 500)])
def test_distance_buckets_are_those_of_transformers(both_ways, count, longest):
    from transformers.models.t5.modeling_t5 import T5Attention

    length = 1000
    distance = torch.arange(1 - length, length)
    theirs = T5Attention._relative_position_bucket(distance, both_ways, count, longest)
    ours = distance_buckets(length, both_ways=both_ways, count=count, longest=longest)
    np.testing.assert_array_equal(ours, theirs.numpy())


@every_row
@pytest.mark.parametrize("spelling", ["new", "old"])
def test_transformers_reads_the_same_config_from_what_is_written(name, spelling):
    import transformers

    config = seq2seq.checkpoint(name).model.config
    parse = type(config).from_hf
    written = config.to_hf(spelling)
    assert parse(written) == config
    theirs = transformers.AutoConfig.for_model(**written).to_dict()
    # transformers 5 says of every T5 that it is tied; the file tells
    theirs["tie_word_embeddings"] = written["tie_word_embeddings"]
    assert parse(theirs) == config


@pytest.mark.parametrize("model_type", ["t5", "mt5", "bart"])
def test_absent_keys_take_the_defaults_of_transformers(model_type):
    import transformers

    theirs = transformers.AutoConfig.for_model(model_type).to_dict()
    parse = family_of({"model_type": model_type}).parse
    ours, read = (parse(hf).to_hf() for hf in ({"model_type": model_type}, theirs))
    assert {key: value for key, value in read.items() if key in ours} == ours


REFUSED = [
    ({"model_type": "t5", "feed_forward_proj": "gated-swiglu"}, "feed_forward_proj='gated-swiglu'"),
    ({"model_type": "t5", "is_encoder_decoder": False}, "is_encoder_decoder=False"),
    ({"model_type": "bart", "d_model": 30}, "d_model=30 is not a multiple.*encoder_attention"),
    ({"model_type": "bart", "normalize_before": True}, "normalize_before=True"),
    ({"model_type": "bart", "tie_word_embeddings": False}, "tie_word_embeddings=False"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_values_that_cannot_be_honoured_are_refused_by_name(config, message):
    with pytest.raises(CheckpointError, match=message):
        family_of(config).parse(config)


def test_a_dtype_that_t5_overflows_and_a_kernel_without_biases_are_refused():
    model, params = seq2seq.checkpoint("t5")[2:]
    with pytest.raises(ConfigError, match=r"float16.*bfloat16"):
        build_t5(model.config, dtype=jnp.float16)
    ids = np.ones((1, 2), np.int32)
    with pytest.raises(ConfigError, match=r"cudnn.*bias"):
        model.clone(attention="cudnn").apply({"params": params}, ids, decoder_input_ids=ids)
