"""GGUF files of every supported type, written by llama.cpp's own package, give HF's weights."""

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from jqlora.errors import CheckpointError, SourceError
from jqlora.io import describe, load
from jqlora.io.gguf_config import config_from_gguf
from jqlora.io.readers.gguf import unpermute
from jqlora.io.readers.gguf_header import open_gguf
from tests.io.toy_files import CONFIG, leaf_of, tensors_of

BLOCK = 256  # of the K types: rows must be a multiple of it
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 32, "num_hidden_layers": 2}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name):
    for hf, ours in NAMES.items():
        if hf in name:
            layer = next((f"blk.{part}." for part in name.split(".") if part.isdigit()), "")
            return f"{layer}{ours}.{name.rsplit('.', 1)[1]}"
    return name


def permute(weight, heads):
    """Rows as llama.cpp's converter orders them: the two halves of each head interleaved."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def k_quantized(kind, rows, columns, rng):
    """Random blocks of a K type, which the package decodes but does not write."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (rows, columns // block, size), np.uint8)
    halves = {Kind.Q4_K: [0, 2], Kind.Q6_K: [208]}[kind]
    for at in halves:
        scale = rng.uniform(0.001, 0.01, (rows, columns // block, 1)).astype(np.float16)
        raw[..., at : at + 2] = scale.view(np.uint8)
    return raw.reshape(rows, -1)


def write_gguf(path, kind, *, architecture="llama", metadata=(), **overrides):
    """A model whose matrices are of ``kind``; returns what each decodes to, in HF's order."""
    config = {**CONFIG, **SHAPE, "tie_word_embeddings": True, **overrides}
    if architecture == "qwen2":
        config |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(64)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    for add in metadata:
        add(writer)
    expected = {}
    for name, tensor in tensors_of(config).items():
        array = tensor
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        module = name.split(".")[-2]
        order = heads.get(module) if architecture == "llama" else None
        if tensor.ndim == 1:
            expected[name] = array
            writer.add_tensor(gguf_name(name), array)
            continue
        if kind in (Kind.Q4_K, Kind.Q6_K):
            data = k_quantized(kind, *array.shape, rng)
        else:
            data = gguf.quantize(permute(array, order) if order else array, kind)
        decoded = gguf.dequantize(data, kind)
        expected[name] = unpermute(decoded, order) if order else decoded
        if not order and kind == Kind.F32:
            np.testing.assert_array_equal(expected[name], tensor)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize(
    "kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q4_K, Kind.Q6_K]
)
def test_every_type_decodes_exactly(tmp_path, kind):
    path = tmp_path / "toy.gguf"
    expected = write_gguf(path, kind)
    model, params = load(path)
    dtype = {Kind.F16: "float16", Kind.BF16: "bfloat16"}.get(kind, "float32")
    assert model.config.dtype == dtype
    for name, array in expected.items():
        np.testing.assert_array_equal(leaf_of(params, name), array.astype(jnp.dtype(dtype)))


def test_the_rotary_halves_are_put_apart_again():
    weight = np.arange(24.0).reshape(12, 2)
    np.testing.assert_array_equal(unpermute(permute(weight, 3), 3), weight)
    assert not np.array_equal(permute(weight, 3), weight)


def test_the_header_is_what_the_package_reads_of_it(tmp_path):
    values = {
        "list": lambda writer: writer.add_array("words", ["a", "", "ü"]),
        "numbers": lambda writer: writer.add_array("numbers", [1, -2, 3]),
        "floats": lambda writer: writer.add_array("floats", [0.5, 2.0]),
        "bool": lambda writer: writer.add_bool("yes", True),
        "wide": lambda writer: writer.add_int64("wide", -(2**40)),
        "align": lambda writer: writer.add_custom_alignment(64),
    }
    write_gguf(tmp_path / "toy.gguf", Kind.Q8_0, metadata=values.values())
    header, theirs = open_gguf(tmp_path / "toy.gguf"), gguf.GGUFReader(tmp_path / "toy.gguf")
    said = {k: v.contents() for k, v in theirs.fields.items() if not k.startswith("GGUF.")}
    assert header.metadata == said
    where = [(t.name, t.kind, t.shape[::-1], t.offset, t.size) for t in header.tensors]
    assert where == [
        (t.name, t.tensor_type, tuple(t.shape), t.data_offset, t.n_bytes) for t in theirs.tensors
    ]


def test_the_config_says_what_the_metadata_said(tmp_path):
    write_gguf(tmp_path / "toy.gguf", Kind.Q8_0, tie_word_embeddings=False)
    config = config_from_gguf(open_gguf(tmp_path / "toy.gguf"))
    wanted = {
        **SHAPE,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rope_theta": 50000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    assert {key: config[key] for key in wanted} == wanted


def test_biases_of_qwen2_come_along_and_its_rows_stay_in_order(tmp_path):
    expected = write_gguf(tmp_path / "toy.gguf", Kind.Q8_0, architecture="qwen2")
    model, params = load(tmp_path / "toy.gguf")
    assert model.config.model_type == "qwen2"
    assert any(name.endswith("q_proj.bias") for name in expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(leaf_of(params, name), array)


def llama3_divisors(factor=8.0, low=1.0, high=4.0, original=8192, dim=64, theta=50000.0):
    """One divisor a frequency, by the rule of the paper's code, written out plainly."""
    divisors = []
    for i in range(0, dim, 2):
        wavelength = 2 * np.pi * theta ** (i / dim)
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def test_llama_3s_rope_scaling_is_recovered_from_its_divisors(tmp_path):
    add = [lambda writer: writer.add_tensor("rope_freqs.weight", llama3_divisors())]
    write_gguf(tmp_path / "toy.gguf", Kind.Q8_0, metadata=add)
    model, _ = describe(tmp_path / "toy.gguf")
    assert model.config.rope.type == "llama3"
    assert dict(model.config.rope.options)["factor"] == 8.0


def test_divisors_of_another_rule_are_refused(tmp_path):
    other = np.linspace(1, 8, 32, dtype=np.float32)
    add = [lambda writer: writer.add_tensor("rope_freqs.weight", other)]
    write_gguf(tmp_path / "toy.gguf", Kind.Q8_0, metadata=add)
    with pytest.raises(CheckpointError, match=r"'rope_freqs\.weight' does not follow"):
        load(tmp_path / "toy.gguf")


def linear(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(2.0)


def test_linear_rope_scaling_is_read_and_others_are_refused(tmp_path):
    write_gguf(tmp_path / "linear.gguf", Kind.Q8_0, metadata=[linear])
    assert describe(tmp_path / "linear.gguf")[0].config.rope.type == "linear"
    yarn = [lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)]
    write_gguf(tmp_path / "yarn.gguf", Kind.Q8_0, metadata=yarn)
    with pytest.raises(CheckpointError, match="rope scaling 'yarn'"):
        load(tmp_path / "yarn.gguf")


DAMAGE = {
    "truncated": (lambda raw: raw[:-5000], r"is truncated: tensor '.*' ends at byte \d+, the file"),
    "cut in the header": (lambda raw: raw[:200], "is truncated or not a GGUF file"),
    "empty": (lambda raw: b"", "is truncated or not a GGUF file"),
    "not GGUF": (lambda raw: b"PK" + raw[2:], "is truncated or not a GGUF file"),
    "turned": (lambda raw: raw[:4] + raw[7:3:-1] + raw[8:], "was written for machines of other"),
    "of no end": (
        lambda raw: raw[:16] + b"\xff" * 8 + raw[24:],
        "is truncated or not a GGUF file",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_named(tmp_path, kind):
    spoil, message = DAMAGE[kind]
    path = tmp_path / "toy.gguf"
    write_gguf(path, Kind.Q8_0)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"toy\.gguf " + message):
        load(path)


def test_other_architectures_and_parts_of_split_models_are_refused(tmp_path):
    write_gguf(tmp_path / "mamba.gguf", Kind.Q8_0, architecture="mamba")
    with pytest.raises(CheckpointError, match=r"mamba\.gguf: unknown GGUF architecture 'mamba'"):
        load(tmp_path / "mamba.gguf")
    add = [lambda writer: writer.add_uint16("split.count", 2)]
    write_gguf(tmp_path / "split.gguf", Kind.Q8_0, metadata=add)
    with pytest.raises(CheckpointError, match="join it with gguf-split"):
        load(tmp_path / "split.gguf")
    with pytest.raises(SourceError):
        load(tmp_path / "absent.gguf")


def test_an_extra_tensor_is_named(tmp_path):
    extra = [lambda writer: writer.add_tensor("blk.0.mystery.weight", np.ones(3, np.float32))]
    write_gguf(tmp_path / "extra.gguf", Kind.Q8_0, metadata=extra)
    with pytest.raises(CheckpointError, match=r"extra\.gguf: tensor 'blk\.0\.mystery\.weight'"):
        load(tmp_path / "extra.gguf")
