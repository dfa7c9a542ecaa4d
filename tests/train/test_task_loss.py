"""The losses of heads that read beside the ``.loss`` of transformers, live."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from jqlora.errors import ConfigError  # noqa: E402
from jqlora.models.outputs import EncoderOutput, QuestionAnsweringOutput  # noqa: E402
from jqlora.train import causal_lm_loss, loss_for  # noqa: E402
from tests.models import encoders, seq2seq  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.usefixtures("compile_quickly"),
    pytest.mark.filterwarnings("ignore"),
]
SEQUENCE = encoders.SEQUENCE
generator = np.random.default_rng(3)
FLOATS, ONE = generator.normal(size=(3, 3)).astype(np.float32), generator.normal(size=3)
BITS = (generator.random((3, 3)) < 0.5).astype(np.float32)
# What makes a case: base, task, more of the config, and labels other than the usual
CASES = {
    "masked tokens": ("bert", encoders.MASKED, {}, {}),
    "one label": ("bert", SEQUENCE, {}, {}),
    "one label, none of a row": ("roberta", SEQUENCE, {}, {"labels": np.array([1, -100, 2])}),
    "several labels": (
        "roberta",
        SEQUENCE,
        {"problem_type": "multi_label_classification"},
        {"labels": BITS},
    ),
    "several labels by their dtype": ("bert", SEQUENCE, {}, {"labels": BITS}),
    "regression": (
        "bert",
        SEQUENCE,
        {"num_labels": 1},
        {"labels": ONE.astype(np.float32)},
    ),
    "regression of several": (
        "roberta",
        SEQUENCE,
        {"problem_type": "regression"},
        {"labels": FLOATS},
    ),
    "one label of DeBERTa": ("deberta_absolute", SEQUENCE, {}, {}),
    "several labels of DeBERTa": (
        "deberta_absolute",
        SEQUENCE,
        {"problem_type": "multi_label_classification"},
        {"labels": BITS},
    ),
    "one label of BART": ("bart", SEQUENCE, {}, {}),
    "several labels of BART": (
        "bart",
        SEQUENCE,
        {"problem_type": "multi_label_classification"},
        {"labels": BITS},
    ),
    "regression of BART": (
        "bart",
        SEQUENCE,
        {"num_labels": 1},
        {"labels": ONE.astype(np.float32)},
    ),
    "answers of BART": ("bart", encoders.ANSWERS, {}, {}),
    "one label of T5": ("t5", SEQUENCE, {}, {}),
    "labels of tokens of mT5": ("mt5", encoders.TOKENS, {}, {}),
    "answers of T5": ("t5", encoders.ANSWERS, {}, {}),
    "labels of tokens": ("roberta", encoders.TOKENS, {}, {}),
    "answers": ("bert", encoders.ANSWERS, {}, {}),
    "answers outside of the row": (
        "roberta",
        encoders.ANSWERS,
        {},
        {"start_positions": np.array([1, 20, 2]), "end_positions": np.array([3, -4, 14])},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_equal_those_of_transformers(case):
    base, task, extra, labels = CASES[case]
    decodes = base in seq2seq.ROWS
    encoder = (seq2seq if decodes else encoders).checkpoint(base, task, **extra)
    inputs = seq2seq.read_batch(encoder) if decodes else encoders.batch(encoder)
    batch = inputs | encoders.targets(encoder, inputs) | labels
    theirs = encoders.run_theirs(encoder, batch)

    def apply(variables, input_ids, *, key, **others):
        logits = jnp.asarray(encoders.logits_of(theirs))
        if task == encoders.ANSWERS:
            return QuestionAnsweringOutput(start_logits=logits[..., 0], end_logits=logits[..., 1])
        return EncoderOutput(logits=logits)

    total, count = loss_for(encoder.model)(apply, {}, _as_jax(batch), None)
    np.testing.assert_allclose(total / count, float(theirs.loss), rtol=1e-6)
    assert total.dtype == count.dtype == jnp.float32


def _as_jax(batch):
    return {
        name: jnp.asarray(array, jnp.int32 if array.dtype.kind == "i" else jnp.float32)
        for name, array in batch.items()
    }


def test_soft_labels_of_deberta_ask_for_a_problem_type():
    encoder = encoders.checkpoint("deberta_absolute", SEQUENCE)
    output = EncoderOutput(logits=jnp.zeros((3, 3)))
    batch = _as_jax(encoders.batch(encoder) | {"labels": BITS})
    with pytest.raises(ConfigError, match="problem_type"):
        loss_for(encoder.model)(lambda *_, **__: output, {}, batch, None)


def test_a_causal_model_has_the_loss_of_next_tokens():
    from jqlora.models import LlamaForCausalLM

    assert loss_for(LlamaForCausalLM) is causal_lm_loss
