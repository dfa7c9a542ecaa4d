"""The encoders against transformers, live, on tiny random checkpoints of every row."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from jqlora.errors import CheckpointError, ConfigError  # noqa: E402
from jqlora.models import loop_to_scan, scan_to_loop  # noqa: E402
from jqlora.models.deberta import position_rows  # noqa: E402
from jqlora.models.disentangled import Disentangled  # noqa: E402
from jqlora.models.encoder_config import EncoderConfig  # noqa: E402
from jqlora.models.encoder_model import build_encoder  # noqa: E402
from jqlora.run.memory import named  # noqa: E402
from jqlora.tree import flatten  # noqa: E402
from jqlora_kernels.aot_targets import TARGETS  # noqa: E402
from tests.models import encoders  # noqa: E402
from tests.models.variants import gap  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("compile_quickly"),
    pytest.mark.parity,
]
every_row = pytest.mark.parametrize(("base", "task"), encoders.ROWS)
LIMIT = 1e-5  # of the range of logits or hidden states, in float32


@functools.cache
def compiled(base):
    """One program for all the heads of a base: what stands under them is compiled once."""
    rows = {task: encoders.checkpoint(base, task) for task in encoders.HEADS[base]}

    @jax.jit
    def apply(params, inputs):
        return {
            task: row.model.apply({"params": params[task]}, **inputs, output_hidden_states=True)
            for task, row in rows.items()
        }

    return functools.partial(apply, {task: row.params for task, row in rows.items()})


def run(base, task, inputs):
    return compiled(base)(inputs)[task]


def at_real_tokens(array, inputs):
    """Where an array is by token, those that are no padding."""
    array = np.asarray(array, np.float32)
    real = inputs["attention_mask"].astype(bool)
    return array[real] if array.shape[:2] == real.shape else array


@every_row
def test_logits_and_every_hidden_state_equal_transformers(base, task, record_property):
    encoder = encoders.checkpoint(base, task)
    inputs = encoders.batch(encoder)
    theirs, ours = encoders.run_theirs(encoder, inputs), run(base, task, inputs)
    assert len(theirs.hidden_states) == len(ours.hidden_states)
    hidden = [
        gap(at_real_tokens(mine, inputs), at_real_tokens(state, inputs))
        for mine, state in zip(ours.hidden_states, theirs.hidden_states, strict=True)
    ]
    both = [encoders.logits_of(output) for output in (ours, theirs)]
    if task != encoders.ANSWERS:  # whose loss compares all tokens, those of padding too
        both = [at_real_tokens(array, inputs) for array in both]
    logits = gap(*both)
    record_property("hidden", max(hidden))
    record_property("logits", logits)
    assert max(hidden) < LIMIT
    assert logits < LIMIT


@every_row
def test_what_stands_at_padding_changes_nothing(base, task):
    encoder = encoders.checkpoint(base, task)
    inputs = encoders.batch(encoder)
    padding = inputs["attention_mask"] == 0
    other = inputs | {"input_ids": np.where(padding, 7, inputs["input_ids"])}
    before, after = (encoders.logits_of(run(base, task, i)) for i in (inputs, other))
    np.testing.assert_array_equal(at_real_tokens(after, inputs), at_real_tokens(before, inputs))
    assert np.isfinite(after).all()


def test_positions_that_count_tokens_serve_padding_on_the_left():
    encoder = encoders.checkpoint("roberta", encoders.TOKENS)
    inputs = encoders.batch(encoder)
    left = {name: array[:, ::-1].copy() for name, array in inputs.items()}
    theirs, ours = encoders.run_theirs(encoder, left), run("roberta", encoders.TOKENS, left)
    assert gap(at_real_tokens(ours.logits, left), at_real_tokens(theirs.logits, left)) < LIMIT


ONE_OF_EACH = [
    ("bert", encoders.SEQUENCE),
    ("roberta", encoders.TOKENS),
    ("deberta_v3", encoders.MASKED),
    ("deberta_v2", encoders.SEQUENCE),
]


@pytest.mark.parametrize(("base", "task"), ONE_OF_EACH)
def test_bf16_strays_from_float32_no_further_than_transformers_does(base, task):
    """The budget is transformers' own error; the slack of a quarter covers chance."""
    encoder = encoders.checkpoint(base, task)
    inputs = encoders.batch(encoder, rows=8)
    exact = at_real_tokens(encoders.run_theirs(encoder, inputs).logits, inputs)
    rounded = encoder._replace(hf=copy.deepcopy(encoder.hf).bfloat16())
    theirs = at_real_tokens(encoders.run_theirs(rounded, inputs).logits.float(), inputs)
    params = jax.tree.map(lambda w: np.asarray(w).astype(jnp.bfloat16), encoder.params)
    model = encoder.model.clone(dtype=jnp.bfloat16)
    ours = jax.jit(model.apply)({"params": params}, **inputs).logits
    assert ours.dtype == jnp.bfloat16
    error = np.linalg.norm(at_real_tokens(ours, inputs) - exact)
    assert error < 1.25 * np.linalg.norm(theirs - exact)


def test_a_kernel_without_biases_is_refused_for_scores_that_have_one():
    encoder = encoders.checkpoint(*ONE_OF_EACH[3])
    assert encoder.model.config.disentangled is not None
    model, ids = encoder.model.clone(attention="cudnn"), jnp.ones((1, 2), jnp.int32)
    with pytest.raises(ConfigError, match=r"cudnn.*bias"):
        model.apply({"params": encoder.params}, ids)


def test_attention_may_be_xlas_on_a_device_that_would_have_cudnns():
    encoder = encoders.checkpoint(*ONE_OF_EACH[0])
    model = encoder.model.clone(attention="xla", dtype=jnp.bfloat16)
    with named(TARGETS["h100"]):
        trace = jax.make_jaxpr(model.apply)({"params": encoder.params}, jnp.ones((1, 2), jnp.int32))
    assert "dot_product_attention_fwd" not in str(trace)


@pytest.mark.parametrize(("base", "task"), [ONE_OF_EACH[0], ONE_OF_EACH[2], ONE_OF_EACH[3]])
def test_loops_and_recomputation_change_neither_values_nor_gradients(base, task):
    encoder = encoders.checkpoint(base, task)
    inputs, model, params = encoders.batch(encoder), encoder.model, encoder.params
    ways = (model, model.clone(scan=False, remat="dots"), model.clone(remat="full"))

    def value_and_gradient(model, params):
        def loss(params):
            logits = model.apply({"params": params}, **inputs).logits
            return jnp.mean(jnp.square(logits))

        return jax.value_and_grad(loss)(params)

    @jax.jit
    def every(*params):  # one program: what the ways have in common is compiled once
        return [value_and_gradient(*way) for way in zip(ways, params, strict=True)]

    (value, gradient), again, remat = every(params, scan_to_loop(params), params)
    flat = jax.tree.map(np.asarray, flatten(gradient))
    largest = max(np.abs(leaf).max() for leaf in flat.values())
    for other, leaves in ((again[0], loop_to_scan(again[1])), remat):
        np.testing.assert_allclose(other, value, rtol=1e-5)
        leaves = flatten(leaves)
        for path, leaf in flat.items():
            # a bias of keys has no gradient but rounding: softmax does not see it
            scale = max(np.abs(leaf).max(), 1e-2 * largest)
            assert np.abs(np.asarray(leaves[path]) - leaf).max() <= 1e-5 * scale, path


@pytest.mark.parametrize(("buckets", "longest"), [(256, 512), (32, 512), (4, 40), (0, 6)])
def test_position_buckets_are_those_of_transformers(buckets, longest):
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    length = 700
    span = buckets or longest
    like = torch.zeros(1, length, 1)
    theirs = build_relative_position(like, like, buckets or -1, longest)[0].numpy()
    ours = position_rows(Disentangled(relative=True, buckets=buckets, longest=longest), length)
    np.testing.assert_array_equal(ours, np.clip(theirs + span, 0, 2 * span - 1))


@pytest.mark.parametrize("base", encoders.BASES)
@pytest.mark.parametrize("spelling", ["new", "old"])
def test_transformers_reads_the_same_config_from_what_is_written(base, spelling):
    import transformers

    names = {"id2label": {0: "no", 1: "maybe", 2: "yes"}, "problem_type": "regression"}
    hf = encoders.checkpoint(base, encoders.HEADS[base][0]).config | names
    config = EncoderConfig.from_hf(hf)
    written = config.to_hf(spelling)
    assert EncoderConfig.from_hf(written) == config
    theirs = transformers.AutoConfig.for_model(**written)
    assert EncoderConfig.from_hf(theirs.to_dict()) == config
    assert config.labels == ("no", "maybe", "yes")


@pytest.mark.parametrize("model_type", ["bert", "roberta", "xlm-roberta", "deberta-v2"])
def test_absent_keys_take_the_defaults_of_transformers(model_type):
    import transformers

    theirs = transformers.AutoConfig.for_model(model_type).to_dict()
    ours, read = EncoderConfig.from_hf({"model_type": model_type}), EncoderConfig.from_hf(theirs)
    assert ours == EncoderConfig.from_hf(read.to_hf() | {k: None for k, _ in read.dropouts}) or (
        ours.to_hf() == {k: v for k, v in read.to_hf().items() if k not in dict(read.dropouts)}
    )


REFUSED = [
    ({"is_decoder": True}, r"is_decoder=True.*False"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
    ({"hidden_size": 30}, "hidden_size=30 is not a multiple"),
    ({"problem_type": "ranking"}, r"problem_type='ranking'.*regression"),
    ({"id2label": {0: "a", 2: "b"}}, r"id2label.*without gaps"),
    ({"model_type": "deberta-v2", "pos_att_type": "p2p"}, r"pos_att_type='p2p'.*c2p"),
    ({"model_type": "deberta-v2", "pos_att_type": "c2p"}, "null without relative_attention"),
    ({"model_type": "deberta-v2", "conv_kernel_size": 2}, "conv_kernel_size=2.*odd"),
    ({"model_type": "deberta-v2", "conv_act": "softplus"}, "conv_act='softplus'.*tanh"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_values_that_cannot_be_honoured_are_refused_by_name(changes, message):
    with pytest.raises(CheckpointError, match=message):
        EncoderConfig.from_hf(encoders.TINY | {"model_type": "bert"} | changes)


def test_a_masked_head_apart_from_its_embedding_is_refused():
    config = EncoderConfig.from_hf({"model_type": "bert", "tie_word_embeddings": False})
    with pytest.raises(CheckpointError, match="tie_word_embeddings=False"):
        build_encoder(config, encoders.MASKED)
