"""GGUF files of every architecture, named by llama.cpp itself, give HF's weights and config."""

import dataclasses

import gguf
import numpy as np
import pytest

from jqlora.io import load
from jqlora.models import family_of
from tests.io.toy_files import tensors_of
from tests.models.variants import ROWS, TINY

pytestmark = pytest.mark.usefixtures("compile_quickly")

# what a file cannot say, as it is the same in all models of that kind
SAME = {"query_pre_attn_scalar": 12, "hidden_act": "gelu_pytorch_tanh"}
CASES = {
    "qwen3": TINY | {"model_type": "qwen3", "head_dim": 12},
    "gemma": TINY | ROWS["gemma"] | SAME,
    "gemma2": TINY | ROWS["gemma2"] | SAME,
    "gemma3": TINY | ROWS["gemma3"] | SAME,
    "phi3": TINY | {"model_type": "phi3", "sliding_window": 6},
    "phi3 of a longer context": TINY | ROWS["phi3_longrope"],
    "gpt2": TINY | ROWS["gpt2"],
}


def write(path, architecture, config, tensors):
    """As llama.cpp's converter does: its names, norms of Gemma from 1, Conv1D turned."""
    parsed = family_of(config).parse(config)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(parsed.num_hidden_layers)
    writer.add_context_length(parsed.max_position_embeddings)
    writer.add_embedding_length(parsed.hidden_size)
    writer.add_feed_forward_length(parsed.intermediate_size)
    writer.add_head_count(parsed.num_attention_heads)
    for add, token in (
        (writer.add_bos_token_id, parsed.bos_token_id),
        (writer.add_eos_token_id, parsed.eos_token_ids[0]),
        (writer.add_pad_token_id, parsed.pad_token_id),
    ):
        add(token)
    if architecture == "gpt2":
        writer.add_layer_norm_eps(parsed.layer_norm_eps)
    else:
        writer.add_head_count_kv(parsed.num_key_value_heads)
        if architecture != "phi3":
            writer.add_key_length(parsed.head_dim)
        writer.add_rope_dimension_count(int(parsed.head_dim * parsed.rope.partial))
        if parsed.rope.type == "longrope":
            writer.add_rope_scaling_orig_ctx_len(parsed.switch)
            for length in ("short", "long"):
                factors = np.array(parsed.rope.option(f"{length}_factor"), np.float32)
                writer.add_tensor(f"rope_factors_{length}.weight", factors)
        writer.add_layer_norm_rms_eps(parsed.rms_norm_eps)
        writer.add_rope_freq_base(parsed.rope.theta)
        if parsed.rope.type == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(parsed.rope.option("factor"))
        if parsed.sliding_window is not None:
            writer.add_sliding_window(parsed.sliding_window)
        if parsed.attention_softcap is not None:
            writer.add_attn_logit_softcapping(parsed.attention_softcap)
        if parsed.logit_softcap is not None:
            writer.add_final_logit_softcapping(parsed.logit_softcap)
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, parsed.num_hidden_layers)
    for name, tensor in tensors.items():
        if name.endswith("norm.weight") and architecture.startswith("gemma"):
            tensor = tensor + np.float32(1)
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored, name
        writer.add_tensor(stored, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("case", CASES)
def test_a_file_gives_the_weights_and_the_config_of_the_checkpoint(case, tmp_path):
    architecture, config = case.split()[0], CASES[case]
    tensors = tensors_of(config)
    write(tmp_path / "toy.gguf", architecture, config, tensors)
    model, params = load(tmp_path / "toy.gguf")
    family = family_of(config)
    assert model.config == dataclasses.replace(family.parse(config), dtype="float32")
    for name in family.hf_names(model):
        leaf = params
        for part in name.path:
            leaf = leaf[part]
        leaf = np.asarray(leaf if name.index is None else leaf[name.index])
        expected = tensors[name.hf].T if name.transpose else tensors[name.hf]
        # adding 1 and taking it away again rounds once
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=np.finfo(np.float32).eps)
        if not name.hf.endswith("norm.weight"):
            np.testing.assert_array_equal(leaf, expected)
