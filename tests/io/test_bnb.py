"""bitsandbytes' 4-bit checkpoints, live: its bytes are used as they are, and ours serve it."""

import json

import pytest

torch = pytest.importorskip("torch")
bitsandbytes = pytest.importorskip("bitsandbytes")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers import LlamaConfig as TorchConfig  # noqa: E402

from jqlora.attach import bind  # noqa: E402
from jqlora.errors import CheckpointError  # noqa: E402
from jqlora.io import load, quantize_checkpoint, save_pretrained  # noqa: E402
from jqlora.io.readers import open_directory  # noqa: E402
from jqlora.quant import FP4, NF4, QTensor  # noqa: E402
from tests.io.toy_files import Q, leaf_of, write_checkpoint, write_tensors  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    # bitsandbytes looks for an optional package of kernels and warns that there is none
    pytest.mark.filterwarnings("ignore"),
]
KINDS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)]
SPECS = {"nf4": NF4, "fp4": FP4}


def torch_model(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # or its first evaluation repacks the weights and computes in bfloat16
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def quantized_by_transformers(tmp_path, scheme, double_quant, storage=torch.uint8):
    write_checkpoint(tmp_path / "dense", dtype=jnp.bfloat16)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=scheme,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=storage,
    )
    model = torch_model(tmp_path / "dense", quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bnb")
    return model


def qtensors(model):
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            yield f"{name}.weight", module.weight


def layer_of(params, name):
    """The QTensor of one layer under its HF name."""
    parts = name.removesuffix(".weight").split(".")
    node = params
    for part in parts:
        node = node if part.isdigit() else node[part]
    index = next(int(part) for part in parts if part.isdigit())
    return jax.tree.map(lambda leaf: np.asarray(leaf)[index], node["kernel"])


def assert_same_tensors(left, right):
    """Of two checkpoints: names, shapes, dtypes, bytes."""
    left, right = open_directory(left), open_directory(right)
    assert set(left.names()) == set(right.names())
    for name in left.names():
        assert left.info(name) == right.info(name), name
        assert left.read(name).tobytes() == right.read(name).tobytes(), name


@pytest.mark.parametrize(("scheme", "double_quant"), KINDS)
@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float16", "float32"])
def test_stored_codes_are_used_as_they_are_and_saved_again(tmp_path, scheme, double_quant, storage):
    model = quantized_by_transformers(tmp_path, scheme, double_quant, getattr(torch, storage))
    loaded, params = load(tmp_path / "bnb")
    save_pretrained(tmp_path / "again", loaded, params)
    assert_same_tensors(tmp_path / "bnb", tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_quant_storage"] == storage
    count = 0
    for name, weight in qtensors(model):
        ours = layer_of(params, name)
        assert isinstance(ours, QTensor)
        assert ours.spec == SPECS[scheme](double_quant=double_quant, storage=storage)
        stored = weight.data.view(torch.uint8).numpy().reshape(-1)
        np.testing.assert_array_equal(np.asarray(ours.codes).reshape(-1), stored)
        decoded = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        np.testing.assert_array_equal(
            np.asarray(ours.dequantize_rows()).view(np.int16), decoded.view(torch.int16).numpy()
        )
        count += 1
    assert count == 14


@pytest.mark.parametrize(("scheme", "double_quant"), KINDS)
def test_transformers_loads_what_we_quantize_with_our_bytes(tmp_path, scheme, double_quant):
    write_checkpoint(tmp_path / "dense", tie_word_embeddings=True)
    spec = SPECS[scheme](double_quant=double_quant)
    quantize_checkpoint(tmp_path / "dense", tmp_path / "ours", spec)
    theirs = torch_model(tmp_path / "ours")
    model, params = load(tmp_path / "ours")
    for name, weight in qtensors(theirs):
        ours = layer_of(params, name)
        np.testing.assert_array_equal(
            np.asarray(ours.codes).reshape(-1), weight.data.numpy().reshape(-1)
        )
        decoded = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        np.testing.assert_array_equal(np.asarray(ours.dequantize_rows()), decoded.numpy())
    ids = np.arange(12, dtype=np.int32)[None]
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids).long()).logits.numpy()
    got = np.asarray(jax.jit(bind(model))({"params": params}, ids).logits)
    assert np.abs(got - expected).max() < 1e-4 * np.ptp(expected)


def test_nf4_files_equal_those_of_transformers_byte_for_byte(tmp_path):
    quantized_by_transformers(tmp_path, "nf4", False)
    quantize_checkpoint(tmp_path / "dense", tmp_path / "ours", NF4())
    assert_same_tensors(tmp_path / "bnb", tmp_path / "ours")


def rewrite(folder, change):
    """Change the tensors of a saved checkpoint."""
    reader = open_directory(folder)
    tensors = {name: reader.read(name) for name in reader.names()}
    change(tensors)
    write_tensors(folder, tensors)


def test_a_foreign_second_level_is_decoded_to_exact_scales(tmp_path):
    model = quantized_by_transformers(tmp_path, "nf4", True)

    def shift(tensors):
        for name in [n for n in tensors if n.endswith("nested_quant_map")]:
            tensors[name] = tensors[name] * np.float32(1.5)
            absmax = name.replace("quant_map", "absmax")
            tensors[absmax] = tensors[absmax] / np.float32(1.5)

    rewrite(tmp_path / "bnb", shift)
    _, params = load(tmp_path / "bnb")
    for name, weight in qtensors(model):
        ours = layer_of(params, name)
        assert ours.nested is None
        state = weight.quant_state
        table = state.state2.code.numpy() * np.float32(1.5)
        absmax = np.repeat(state.state2.absmax.numpy() / np.float32(1.5), 256)
        codes = state.absmax.numpy()
        expected = table[codes] * absmax[: codes.size] + state.offset.numpy()
        np.testing.assert_array_equal(np.asarray(ours.scales).reshape(-1), expected)


def test_mixed_layers_load_apart_but_not_stacked(tmp_path):
    quantized_by_transformers(tmp_path, "nf4", False)
    dense = open_directory(tmp_path / "dense")

    def mix(tensors):
        for name in [name for name in tensors if name.startswith(Q)]:
            del tensors[name]
        tensors[Q] = dense.read(Q)

    rewrite(tmp_path / "bnb", mix)
    with pytest.raises(CheckpointError, match=r"q_proj\.kernel: its layers .*scan=False"):
        load(tmp_path / "bnb")
    _, params = load(tmp_path / "bnb", scan=False)
    layers = [params["model"][f"layers_{i}"]["self_attn"]["q_proj"]["kernel"] for i in range(2)]
    assert [isinstance(leaf, QTensor) for leaf in layers] == [True, False]


def damage_state(tensors, **changes):
    key = f"{Q}.quant_state.bitsandbytes__nf4"
    state = {**json.loads(tensors[key].tobytes()), **changes}
    tensors[key] = np.frombuffer(json.dumps(state).encode(), np.uint8)


DAMAGE = {
    "no absmax": (lambda t: t.pop(f"{Q}.absmax"), "lacks .*absmax"),
    "other block": (lambda t: damage_state(t, blocksize=60), "has one of the sizes 32, 64"),
    "other shape": (lambda t: damage_state(t, shape=[64, 128]), "expected"),
    "other type": (lambda t: damage_state(t, quant_type="int3"), "quantization state: KeyError"),
    "other dtype": (lambda t: damage_state(t, dtype="int8"), "quantization state"),
    "no JSON": (
        lambda t: t.update({f"{Q}.quant_state.bitsandbytes__nf4": np.zeros(3, np.uint8)}),
        "quantization state",
    ),
    "other values": (
        lambda t: t.update({f"{Q}.quant_map": np.zeros(16, np.float32)}),
        "codes mean other values than nf4's",
    ),
    "short codes": (lambda t: t.update({Q: t[Q][:-1]}), r"is uint8 \[2047, 1\], expected"),
    "short scales": (lambda t: t.update({f"{Q}.absmax": t[f"{Q}.absmax"][:-1]}), "absmax' is"),
}


def test_damaged_quantization_is_named_with_its_tensor(tmp_path):
    quantized_by_transformers(tmp_path, "nf4", False)
    reader = open_directory(tmp_path / "bnb")
    sound = {name: reader.read(name) for name in reader.names()}
    for kind, (spoil, message) in DAMAGE.items():
        tensors = dict(sound)
        spoil(tensors)
        write_tensors(tmp_path / "bnb", tensors)
        with pytest.raises(CheckpointError, match=f"{Q}.*{message}") as caught:
            load(tmp_path / "bnb")
        assert "\n" not in str(caught.value), kind


def test_dense_checkpoints_of_transformers_load_bit_for_bit(tmp_path):
    config = TorchConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    cases = {
        "single": ({}, {}),
        "sharded": ({}, {"max_shard_size": "10KB"}),
        "tied": ({"tie_word_embeddings": True}, {}),
    }
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, (changes, options) in cases.items():
            folder = tmp_path / f"{name}-{dtype}"
            config.update({"tie_word_embeddings": False, **changes})
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            model.save_pretrained(folder, **options)
            check_dense(folder, model)
            if name != "sharded":
                for file in folder.glob("*.safetensors"):
                    file.unlink()
                torch.save(model.state_dict(), folder / "pytorch_model.bin")
                check_dense(folder, model)


def check_dense(folder, model):
    loaded, params = load(folder)
    assert f"torch.{jnp.dtype(loaded.dtype).name}" == str(model.dtype)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            assert "lm_head" not in params
            continue
        got = leaf_of(params, name)
        expected = tensor.contiguous().view(torch.uint8).numpy()
        assert np.ascontiguousarray(got).tobytes() == expected.tobytes(), name


def test_codes_of_conv1d_weights_are_those_that_transformers_loads(tmp_path):
    sizes = {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 16}
    dense = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.normal_(0, 0.2)
    dense.save_pretrained(tmp_path / "dense")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "ours", NF4())
    theirs = torch_model(tmp_path / "ours")
    model, params = load(tmp_path / "ours")
    kernel = params["transformer"]["h"]["mlp"]["c_proj"]["kernel"]
    weight = theirs.transformer.h[1].mlp.c_proj.weight
    decoded = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    np.testing.assert_array_equal(np.asarray(kernel.dequantize())[1], decoded.numpy().T)
    ids = np.arange(12, dtype=np.int32)[None]
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids).long()).logits.numpy()
    got = np.asarray(jax.jit(bind(model))({"params": params}, ids).logits)
    assert np.abs(got - expected).max() < 1e-4 * np.ptp(expected)


def test_what_we_save_transformers_loads_with_equal_logits(tmp_path):
    write_checkpoint(tmp_path / "a")
    model, params = load(tmp_path / "a")
    save_pretrained(tmp_path / "b", model, params, max_shard_bytes=60_000)
    theirs = torch_model(tmp_path / "b")
    ids = np.arange(12, dtype=np.int32)[None]
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids).long()).logits.numpy()
    got = np.asarray(jax.jit(model.apply)({"params": params}, ids).logits)
    assert np.abs(got - expected).max() < 1e-4 * np.ptp(expected)
