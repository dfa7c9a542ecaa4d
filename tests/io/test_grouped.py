"""GPTQ's and AWQ's files against their published definitions, unpacked here in torch."""

import json

import pytest

torch = pytest.importorskip("torch")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig  # noqa: E402

from jqlora.attach import bind, init, plan  # noqa: E402
from jqlora.errors import CheckpointError, ConfigError, MergeError  # noqa: E402
from jqlora.io import describe, load, quantize_checkpoint, save_pretrained  # noqa: E402
from jqlora.io.grouped import spec_of  # noqa: E402
from jqlora.io.merge_files import merge_checkpoint  # noqa: E402
from jqlora.io.peft import save_adapter  # noqa: E402
from jqlora.io.readers import open_directory  # noqa: E402
from jqlora.merging import delta, requantize  # noqa: E402
from jqlora.methods import LoRA  # noqa: E402
from jqlora.quant import NF4, QTensor  # noqa: E402
from tests.io.toy_files import write_checkpoint  # noqa: E402

pytestmark = pytest.mark.parity
# the rest is kept whole, as a checkpoint may keep modules
QUANTIZED = ("self_attn.q_proj", "mlp.down_proj")
MODULES = [f"model.layers.{i}.{name}" for i in range(2) for name in QUANTIZED]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "GEMM"}
KINDS = {
    "gptq": GPTQ,
    "gptq in order": GPTQ | {"desc_act": True},
    "gptq_v2 in order": GPTQ | {"sym": False, "desc_act": True, "checkpoint_format": "gptq_v2"},
    "gptq of whole rows": GPTQ | {"group_size": -1, "desc_act": True},
    "gptq of 8 bits": GPTQ | {"bits": 8, "sym": False, "group_size": 64},
    "awq": AWQ,
}


def is_first(config):
    """Whether zero points are stored less one."""
    return config["quant_method"] == "gptq" and "checkpoint_format" not in config


def write(folder, config, scale_dtype=np.float16, change=lambda config, tensors: None):
    """A checkpoint whose words are random: every word is eight codes, or four."""
    rng, bits = np.random.default_rng(0), config["bits"]
    info = np.iinfo(np.int32)

    def words(*shape):
        return rng.integers(info.min, info.max, shape, endpoint=True).astype(np.int32)

    def spoil(model, tensors):
        for module in MODULES:
            outputs, inputs = tensors.pop(f"{module}.weight").shape
            group = inputs if config["group_size"] == -1 else config["group_size"]
            groups, per_word = inputs // group, 32 // bits
            scales = rng.uniform(0.005, 0.02, (groups, outputs)) * 16 / 2**bits
            parts = {"scales": scales.astype(scale_dtype)}
            if config["quant_method"] == "awq":
                parts["qweight"] = words(inputs, outputs // 8)
            else:
                parts["qweight"] = words(inputs // per_word, outputs)
                order = rng.permutation(inputs) if config["desc_act"] else np.arange(inputs)
                parts["g_idx"] = (order // group).astype(np.int32)
            parts["qzeros"] = words(groups, outputs // per_word)
            if config.get("sym"):
                middle = 2 ** (bits - 1) - is_first(config)
                word = sum(middle << (bits * i) for i in range(per_word))
                parts["qzeros"] = np.full_like(parts["qzeros"], word)
            tensors |= {f"{module}.{part}": array for part, array in parts.items()}
        model["quantization_config"] = config
        change(model, tensors)

    return write_checkpoint(folder, spoil, dtype=np.float16)


def unpacked(words, bits, axis):
    """Codes of int32 words along an axis, the lowest bits first."""
    shifts = torch.arange(0, 32, bits)
    words = words.movedim(axis, -1)
    codes = (words[..., None] >> shifts) & (2**bits - 1)
    return codes.flatten(-2).movedim(-1, axis)


def reference(tensors, module, config):
    """W [N, K], by the formats' definitions, in the dtype of the scales."""
    part = {
        name: torch.from_numpy(tensors[f"{module}.{name}"])
        for name in ("qweight", "qzeros", "scales", "g_idx")
        if f"{module}.{name}" in tensors
    }
    bits, scales = config["bits"], part["scales"]
    zeros = unpacked(part["qzeros"], bits, 1)
    if config["quant_method"] == "gptq":
        codes = unpacked(part["qweight"], bits, 0)
        groups = part["g_idx"].long()
        zeros = zeros + is_first(config)
    else:
        codes = unpacked(part["qweight"], bits, 1)
        place = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # of column j of eight in its word

        def sorted_columns(values):
            return values.unflatten(1, (-1, 8))[..., place].flatten(1)

        codes, zeros = sorted_columns(codes), sorted_columns(zeros)
        groups = torch.arange(len(codes)) // config["group_size"]
    return ((codes - zeros[groups]).to(scales.dtype) * scales[groups]).T


def leaf_of(params, module):
    """The QTensor of one module."""
    *_, index, block, name = module.split(".")
    stack = params["model"]["layers"][block][name]["kernel"]
    assert isinstance(stack, QTensor)
    return jax.tree.map(lambda leaf: leaf[int(index)], stack)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_definition_and_files_are_written_back(kind, tmp_path):
    config = KINDS[kind]
    tensors = write(tmp_path / "a", config)
    model, params = load(tmp_path / "a")
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), params)
    assert shapes == jax.tree.map(lambda a: (a.shape, a.dtype), describe(tmp_path / "a")[1])
    for module in MODULES:
        got = np.asarray(leaf_of(params, module).dequantize_rows())
        np.testing.assert_array_equal(got, reference(tensors, module, config).numpy())
    save_pretrained(tmp_path / "b", model, params)
    saved = open_directory(tmp_path / "b")
    assert set(saved.names()) == tensors.keys()
    for name, array in tensors.items():
        assert saved.info(name) == (array.shape, array.dtype)
        assert saved.read(name).tobytes() == array.tobytes(), name
    written = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert spec_of(written) == spec_of(config)
    theirs = (AwqConfig if config["quant_method"] == "awq" else GPTQConfig)(**written)
    assert (theirs.bits, theirs.group_size) == (config["bits"], config["group_size"])


@pytest.fixture(scope="module")
def ordered(tmp_path_factory):
    """(folder, tensors, model, params) with zero points and groups out of order."""
    folder = tmp_path_factory.mktemp("grouped")
    tensors = write(folder / "base", KINDS["gptq_v2 in order"])
    return folder, tensors, *load(folder / "base", dtype="float32")


def test_logits_are_those_of_the_decoded_weights_in_transformers(ordered):
    folder, tensors, model, params = ordered

    def decode(config, dense):
        for module in MODULES:
            weight = reference(tensors, module, KINDS["gptq_v2 in order"])
            dense[f"{module}.weight"] = weight.numpy()

    write_checkpoint(folder / "dense", decode, dtype=np.float16)
    theirs = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32).eval()
    ids = np.arange(12, dtype=np.int32)[None]
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids).long()).logits.numpy()
    got = np.asarray(jax.jit(bind(model))({"params": params}, jnp.asarray(ids)).logits)
    assert np.abs(got - expected).max() < 1e-4 * np.ptp(expected)


def test_an_adapter_is_merged_file_by_file_and_nothing_is_calibrated_again(ordered):
    folder, _, model, params = ordered
    ours = plan(model, params, LoRA(rank=2, targets=["q_proj"]))
    adapters = jax.tree.map(lambda leaf: leaf + 0.05, init(jax.random.key(0), ours))
    save_adapter(folder / "adapter", ours, adapters, model=model)
    merge_checkpoint(folder / "base", folder / "adapter", folder / "merged", dtype="float32")
    base = params["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    # decoded to the type of its scales, which is what the format defines
    expected = base.dequantize().astype(jnp.float32) + delta(ours.placements[0], adapters)
    merged = open_directory(folder / "merged")
    for module, kernel in zip(MODULES[::2], expected, strict=True):
        found = merged.read(f"{module}.weight").T
        np.testing.assert_allclose(found, kernel, rtol=0, atol=1e-6)
    with pytest.raises(MergeError, match=r"q_proj\.kernel of gptq_v2 was .* calibration"):
        requantize({"q_proj": {"kernel": expected}}, {"q_proj": {"kernel": base}})
    with pytest.raises(ConfigError, match=r"already quantized \(gptq\)"):
        quantize_checkpoint(folder / "base", folder / "out", NF4())


def test_scales_keep_their_type_and_biases_of_zeros_are_passed_over(tmp_path):
    bias = f"{MODULES[0]}.bias"

    def add_bias(config, tensors):
        tensors[bias] = np.zeros(64, np.float16)

    tensors = write(tmp_path / "a", AWQ, np.float32, add_bias)
    save_pretrained(tmp_path / "b", *load(tmp_path / "a"))
    saved = open_directory(tmp_path / "b")
    assert set(saved.names()) == tensors.keys() - {bias}
    name = f"{MODULES[0]}.scales"
    assert saved.read(name).tobytes() == tensors[name].tobytes()

    def add_other(config, tensors):
        tensors[bias] = np.ones(64, np.float16)

    write(tmp_path / "c", AWQ, change=add_other)
    with pytest.raises(CheckpointError, match=r"q_proj\.bias' has no place"):
        load(tmp_path / "c")


def test_a_config_beside_the_model_config_is_read_too(tmp_path):
    write(tmp_path, GPTQ | {"bits": 8})
    config = json.loads((tmp_path / "config.json").read_text())
    beside = config.pop("quantization_config")
    del beside["quant_method"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "quantize_config.json").write_text(json.dumps(beside))
    leaf = describe(tmp_path)[1]["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert leaf.spec == spec_of(GPTQ | {"bits": 8})


def part(name, change):
    """A change of one part of the first module."""
    key = f"{MODULES[0]}.{name}"
    return lambda config, tensors: tensors.update({key: change(tensors[key])})


DAMAGE = {
    "no groups": (
        GPTQ,
        lambda c, t: t.pop(f"{MODULES[0]}.g_idx"),
        "g_idx' is missing, expected .64. of int32",
    ),
    "no scales": (AWQ, lambda c, t: t.pop(f"{MODULES[0]}.scales"), "scales' is missing"),
    "short": (AWQ, part("scales", lambda a: a[:-1]), r"is float16 \[1, 64\], expected \[2, 64\]"),
    "bytes": (GPTQ, part("qweight", lambda a: a.view(np.uint32)), "is uint32 .* of int32"),
    "no symmetry": (GPTQ, part("qzeros", lambda a: a + 1), "config.json says sym; set it to false"),
    "order": (GPTQ, part("g_idx", lambda a: a[::-1]), "config.json says no desc_act"),
    "uneven": (
        GPTQ | {"desc_act": True},
        part("g_idx", lambda a: np.maximum(a, np.arange(64) == 0).astype(np.int32)),
        "not all of 32 inputs",
    ),
    "no config": (GPTQ, lambda c, t: c.pop("quantization_config"), "no quantization_config of gp"),
    "odd groups": (AWQ | {"group_size": 48}, lambda c, t: None, r"\[64, 128\] in groups of 48"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_parts_that_disagree_are_named(kind, tmp_path):
    config, change, message = DAMAGE[kind]
    write(tmp_path, config, change=change)
    with pytest.raises(CheckpointError, match=rf"_proj\.qweight.*{message}"):
        load(tmp_path)
