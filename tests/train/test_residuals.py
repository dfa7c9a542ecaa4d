"""What a step keeps for its backward pass, and what it takes no gradient of, by its trace."""

import jax
import jax.numpy as jnp
import pytest

from jqlora.attach import bind, init, plan
from jqlora.methods import LoRA
from jqlora.models import LlamaConfig, LlamaForCausalLM, abstract_params
from jqlora.quant import NF4, quantize_params
from jqlora.train import causal_lm_loss
from jqlora.train.loss import BATCH
from jqlora.train.residuals import residuals
from jqlora_kernels import aot

WIDTH, HIDDEN, LAYERS, TOKENS, VOCABULARY = 64, 192, 3, 24, 320


def model_of(remat, *, width=WIDTH, heads=4, kv_heads=4, **options):
    """A small Llama in bf16."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width // heads,
    )
    types = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    return LlamaForCausalLM(config, remat=remat, **types, **options)


def step_of(remat, scan=True):
    """(apply, adapters, params, batch) of a small QLoRA step, all of it abstract."""
    model = model_of(remat, scan=scan)
    params = quantize_params(abstract_params(model), NF4(double_quant=True))
    planned = plan(model, params, LoRA(rank=2))
    adapters = jax.eval_shape(lambda: init(jax.random.key(0), planned))
    batch = dict.fromkeys(BATCH, jax.ShapeDtypeStruct((1, TOKENS), jnp.int32))
    return bind(model, planned), adapters, params, batch


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("remat", ["none", "dots", "full", "offload"])
def test_no_decoded_matrix_is_kept(remat, scan):
    apply, *arguments = step_of(remat, scan)
    kept = residuals(apply, causal_lm_loss, *arguments)
    matrices = ({WIDTH}, {WIDTH, HIDDEN})
    assert not [leaf for leaf in kept if len(leaf.shape) > 1 and set(leaf.shape[-2:]) in matrices]


def test_a_policy_keeps_of_a_layer_what_it_says():
    def kept(remat):
        """Numbers for each token and layer."""
        apply, *arguments = step_of(remat)
        leaves = residuals(apply, causal_lm_loss, *arguments)
        leaves = [leaf for leaf in leaves if leaf.dtype in (jnp.bfloat16, jnp.uint16)]
        stacks = [leaf for leaf in leaves if leaf.shape[:1] == (LAYERS,)]
        return sum(leaf.size for leaf in stacks) / LAYERS / TOKENS

    assert kept("full") == WIDTH
    # besides the layer's input q, k, v, o, gate and up; no gradient asks for down's output
    assert kept("dots") == WIDTH + 4 * WIDTH + 2 * HIDDEN
    assert kept("none") > kept("dots")


def test_offloading_keeps_the_inputs_of_layers_on_the_host_and_nothing_of_them_on_the_device():
    apply, *arguments = step_of("offload")
    stacks = [
        leaf
        for leaf in residuals(apply, causal_lm_loss, *arguments)
        if leaf.shape[:1] == (LAYERS,) and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    assert [(leaf.shape, leaf.memory_space) for leaf in stacks] == [
        ((LAYERS, 1, TOKENS, WIDTH), jax.memory.Space.Host)
    ]


NO_CUDNN = aot.missing() or None if aot.installed("nvidia.cudnn") else "cuDNN is not installed"


@pytest.mark.skipif(NO_CUDNN is not None, reason=str(NO_CUDNN))
@pytest.mark.parametrize(("remat", "times"), [("none", 1), ("dots", 1), ("full", 2)])
def test_a_policy_that_keeps_products_keeps_what_attention_of_cudnn_returns(remat, times):
    model = model_of(remat, width=128, heads=2, kv_heads=1, attention="cudnn")
    apply = bind(model)

    def total(params, batch):
        return causal_lm_loss(apply, {"params": params}, batch, None)[0]

    batch = dict.fromkeys(BATCH, jax.ShapeDtypeStruct((1, 128), jnp.int32))
    trace = str(jax.make_jaxpr(jax.grad(total))(abstract_params(model), batch))
    assert trace.count("dot_product_attention_fwd_wrapper[") == times
    assert trace.count("dot_product_attention_bwd_wrapper[") == 1


def test_no_gradient_of_the_embedding_is_taken():
    apply, adapters, params, batch = step_of("full")

    def gradient(wanted, adapters, params, batch):
        def total(tree):
            given = {"params": params, **adapters} | tree
            return causal_lm_loss(apply, given, batch, None)[0]

        return jax.grad(total)(wanted)

    ours = str(jax.make_jaxpr(gradient)(adapters, adapters, params, batch))
    shown = f"[{VOCABULARY},{WIDTH}] = scatter-add"
    assert shown not in ours
    # these words are how it would show
    looked_up = jax.make_jaxpr(jax.grad(lambda table: table[jnp.arange(3)].sum()))
    assert shown in str(looked_up(jnp.ones((VOCABULARY, WIDTH))))
