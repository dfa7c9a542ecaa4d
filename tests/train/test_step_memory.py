"""What a QLoRA step of real width holds on a GPU, from the compiler's assignment of buffers."""

import re

import jax
import jax.numpy as jnp
import pytest

from jqlora.attach import bind, init, plan
from jqlora.methods import LoRA
from jqlora.models import LlamaConfig, LlamaForCausalLM, abstract_params
from jqlora.optim import adamw
from jqlora.quant import NF4, quantize_params
from jqlora.train import TrainState, make_train_step
from jqlora_kernels import aot
from jqlora_kernels.aot_targets import TARGETS

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing())),
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]
WIDTH, HIDDEN, TOKENS = 2048, 5632, 512


def compiled(layers):
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=128,
    )
    model = LlamaForCausalLM(
        config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat="full", attention="xla"
    )
    params = quantize_params(abstract_params(model), NF4(double_quant=True))
    planned = plan(model, params, LoRA(rank=8))
    tx = adamw(1e-4)
    state = jax.eval_shape(
        lambda: TrainState.create(init(jax.random.key(0), planned), tx, jax.random.key(1))
    )
    row = jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)
    names = ("input_ids", "positions", "segment_ids", "loss_mask")
    step = make_train_step(bind(model, planned), tx)
    return aot.compile_for(TARGETS["h100"], step, state, params, dict.fromkeys(names, row))


def test_a_step_decodes_one_matrix_at_a_time_and_copies_no_codes(monkeypatch):
    monkeypatch.setenv("JQLORA_KERNELS", "triton")
    steps = {layers: compiled(layers) for layers in (2, 4)}
    held = {layers: s.memory_analysis().temp_size_in_bytes for layers, s in steps.items()}
    decoded_layer = 2 * (4 * WIDTH**2 + 3 * WIDTH * HIDDEN)
    carried = 2 * TOKENS * WIDTH  # what full rematerialization keeps of a layer, in bfloat16
    assert held[4] - held[2] < 2 * carried + decoded_layer // 20
    assert held[4] < 4 * decoded_layer // 2

    text = steps[4].as_text()
    stacks = set(re.findall(r"u8\[4,(\d+,\d+)\]", text))
    assert f"{WIDTH},{WIDTH // 2}" in stacks
    for shape in stacks:
        assert f"u8[1,{shape}]" not in text
        assert f"u8[{shape}]" not in text
    copies = [line for line in text.splitlines() if " copy(" in line]
    assert not [line for line in copies if "u8[" in line]

    # the whole state is written where it was read, and none of it is copied on the way
    memory = steps[4].memory_analysis()
    metrics = 64
    assert 0 <= memory.output_size_in_bytes - memory.alias_size_in_bytes <= metrics + 2**11
    assert "%state_adapters" in text
    assert not [line for line in copies if re.search(r"= f32\[4,.* copy\(%state_", line)]
