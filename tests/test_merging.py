"""Merging: what is refused, what is kept, and what requantizing costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.attach import bind, init, plan
from jqlora.errors import MergeError
from jqlora.merging import delta, merge, requantize
from jqlora.methods import LoRA
from jqlora.quant import NF4, QTensor, quantize_params
from jqlora.tree import flatten
from tests import toy_models
from tests.toy_models import FORMS, IDS

pytestmark = pytest.mark.usefixtures("compile_quickly")


def set_up(model, spec, storage=None):
    params = toy_models.params_of(model)
    if storage is not None:
        params = quantize_params(params, storage, skip=("head", "lm_head"))
    ours = plan(model, params, spec, IDS)
    adapters = init(jax.random.key(0), ours, params)
    return params, ours, jax.tree.map(lambda leaf: leaf + 0.1, adapters)


def test_an_adapter_on_a_tied_embedding_cannot_be_merged():
    params, ours, adapters = set_up(
        toy_models.llama(tied=True), LoRA(rank=2, targets=["embed_tokens"])
    )
    with pytest.raises(MergeError, match=r"model.embed_tokens is also the output head \(tied"):
        merge(ours, params, adapters)


def test_parameters_trained_whole_are_merged_into_tied_embeddings():
    spec = LoRA(rank=2, targets=["q_proj"], modules_to_save=["embed_tokens"])
    model = toy_models.llama(tied=True)
    params, ours, adapters = set_up(model, spec)
    merged = model.apply({"params": merge(ours, params, adapters)}, IDS).logits
    np.testing.assert_allclose(
        merged, bind(model, ours)({"params": params, **adapters}, IDS).logits, atol=2e-4
    )


def test_merging_leaves_other_parameters_and_dtypes_as_they_were():
    model = FORMS["scan"]
    params, ours, adapters = set_up(model, LoRA(rank=2, targets=["up"]))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    merged = flatten(merge(ours, half, adapters))
    for path, leaf in flatten(half).items():
        assert merged[path].dtype == jnp.bfloat16
        assert (merged[path] is leaf) == (path != ("layers", "up", "kernel"))


def test_requantizing_keeps_the_storage_and_reports_the_error():
    model = FORMS["scan"]
    params, ours, adapters = set_up(model, LoRA(rank=2), NF4(block=32, double_quant=True))
    merged = merge(ours, params, adapters)
    assert not any(isinstance(leaf, QTensor) for leaf in flatten(merged).values())
    stored, errors = requantize(merged, params)
    assert jax.tree.structure(stored) == jax.tree.structure(params)
    assert set(errors) == {"layers.up", "layers.down"}
    for module, error in errors.items():
        kernel = merged["layers"][module.split(".")[1]]["kernel"]
        back = stored["layers"][module.split(".")[1]]["kernel"].dequantize()
        assert error == pytest.approx(
            np.linalg.norm(np.ravel(kernel - back)) / np.linalg.norm(np.ravel(kernel)), rel=1e-4
        )
        assert 0.03 < error < 0.15  # NF4's own error on dense random matrices


def test_one_layers_delta_is_its_slice_of_the_stacks():
    spec = LoRA(rank=2, targets=["experts"], rank_pattern={r"layers.1.experts.2": 3})
    spec = LoRA(rank=2, targets=r".*experts.*", rank_pattern=spec.rank_pattern)
    _, ours, adapters = set_up(FORMS["experts"], spec)
    whole = delta(ours.placements[0], adapters).reshape(6, 32, 32)
    for layer in range(6):
        one = delta(ours.placements[0], adapters, layer)
        np.testing.assert_allclose(one, whole[layer], rtol=1e-6)
