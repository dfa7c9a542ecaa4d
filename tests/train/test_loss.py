"""The loss: which tokens count, and what each costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.train.loss import cross_entropy, next_tokens


def batch_of(ids, segments, mask):
    ids, segments, mask = (np.asarray([row], np.int32) for row in (ids, segments, mask))
    return {
        "input_ids": ids,
        "positions": np.zeros_like(ids),
        "segment_ids": segments,
        "loss_mask": mask,
    }


CASES = {
    "only the completion": ([5, 6, 7, 8], [1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 0]),
    "no prediction across sequences": ([5, 6, 7, 8], [1, 1, 2, 2], [1, 1, 1, 1], [1, 0, 1, 0]),
    "no prediction of padding": ([5, 6, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]),
    "nothing learnt": ([5, 6, 7, 8], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]),
}


@pytest.mark.parametrize(("ids", "segments", "mask", "expected"), CASES.values(), ids=CASES.keys())
def test_counted_positions(ids, segments, mask, expected):
    targets, counted = next_tokens(batch_of(ids, segments, mask))
    np.testing.assert_array_equal(counted[0].astype(int), expected)
    np.testing.assert_array_equal(targets[0, :-1], ids[1:])


def test_a_uniform_model_pays_log_vocabulary_per_counted_token():
    batch = batch_of([5, 6, 7, 8], [1, 1, 1, 1], [0, 0, 1, 1])
    total, count = cross_entropy(jnp.zeros((1, 4, 10), jnp.bfloat16), batch)
    assert total.dtype == count.dtype == jnp.float32
    assert count == 2
    np.testing.assert_allclose(total, 2 * np.log(10), rtol=1e-6)


def test_uncounted_logits_get_no_gradient_even_when_infinite(getkey):
    batch = batch_of([5, 6, 7, 8], [1, 1, 0, 0], [1, 1, 1, 1])
    logits = jax.random.normal(getkey(), (1, 4, 10)).at[0, 2:, 0].set(-jnp.inf)
    gradient = jax.grad(lambda x: cross_entropy(x, batch)[0])(logits)
    assert jnp.isfinite(gradient).all()
    assert (gradient[0, 1:] == 0).all()


@pytest.mark.parity
def test_sum_and_gradient_equal_torch_with_ignored_labels(getkey):
    torch = pytest.importorskip("torch")
    from tests.train.toy import make_batch

    batch = make_batch(3)
    logits = jax.random.normal(getkey(), (*batch["input_ids"].shape, 11)) * 5
    ours, gradient = jax.value_and_grad(lambda x: cross_entropy(x, batch)[0])(logits)

    ids, segments = (torch.tensor(batch[k]).long() for k in ("input_ids", "segment_ids"))
    mask = torch.tensor(batch["loss_mask"]).bool()
    keep = mask[:, 1:] & (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    labels = torch.where(keep, ids[:, 1:], -100)
    x = torch.tensor(np.asarray(logits), requires_grad=True)
    theirs = torch.nn.functional.cross_entropy(
        x[:, :-1].reshape(-1, 11), labels.reshape(-1), reduction="sum"
    )
    theirs.backward()
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, x.grad.numpy(), rtol=1e-5, atol=1e-6)
