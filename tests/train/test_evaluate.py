"""Held-out loss is a mean over tokens, however they fall into batches."""

import math

import numpy as np
import pytest

from jqlora.errors import DataError
from jqlora.train.evaluate import Evaluation, evaluate, make_eval_step
from tests.train import toy


def split(batch, at):
    return [{k: v[:at] for k, v in batch.items()}, {k: v[at:] for k, v in batch.items()}]


def test_the_loss_does_not_depend_on_the_batches(getkey):
    params, adapters = toy.init_params(getkey()), toy.init_adapters(getkey())
    step = make_eval_step(toy.apply)
    batch = toy.make_batch(rows=6)
    whole = evaluate(step, params, adapters, [batch])
    for at in (1, 3):
        parts = evaluate(step, params, adapters, split(batch, at))
        assert parts.tokens == whole.tokens
        np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-6)


def test_nothing_to_predict_is_an_error(getkey):
    batch = toy.make_batch() | {"loss_mask": np.zeros((4, 9), np.int32)}
    with pytest.raises(DataError, match="no token"):
        evaluate(
            make_eval_step(toy.apply),
            toy.init_params(getkey()),
            toy.init_adapters(getkey()),
            [batch],
        )


def test_perplexity_is_the_exponential_and_does_not_overflow():
    assert Evaluation(loss=1.0, tokens=1).perplexity == math.e
    assert Evaluation(loss=1e4, tokens=1).perplexity == math.inf
