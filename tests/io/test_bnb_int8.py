"""bitsandbytes' 8-bit checkpoints, live: weights are what LLM.int8() stores, products are not."""

import json

import pytest

torch = pytest.importorskip("torch")
bitsandbytes = pytest.importorskip("bitsandbytes")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: E402

from jqlora.attach import bind, init, plan  # noqa: E402
from jqlora.errors import CheckpointError  # noqa: E402
from jqlora.io import load, save_pretrained  # noqa: E402
from jqlora.io.merge_files import merge_checkpoint  # noqa: E402
from jqlora.io.peft import save_adapter  # noqa: E402
from jqlora.io.readers import open_directory  # noqa: E402
from jqlora.merging import delta, requantize  # noqa: E402
from jqlora.methods import LoRA  # noqa: E402
from jqlora.quant import QTensor, RowInt8  # noqa: E402
from tests.io.toy_files import Q, write_checkpoint, write_tensors  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
IDS = np.arange(12, dtype=np.int32)[None]


def logits_of(model):
    with torch.no_grad():
        return model(torch.from_numpy(IDS).long()).logits.numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that transformers wrote in 8 bits, and the logits of three ways to use it."""
    root = tmp_path_factory.mktemp("int8")
    # rows of no power of two: there is one scale a row
    write_checkpoint(root / "dense", hidden_size=96, intermediate_size=80)
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=5.0)
    options = {"dtype": torch.float32, "device_map": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        root / "dense", quantization_config=config, **options
    ).eval()
    logits = {"llm.int8": logits_of(model)}
    model.save_pretrained(root / "int8")
    logits["decoded"] = logits_of(model.dequantize(dtype=torch.float32))
    logits["dense"] = logits_of(AutoModelForCausalLM.from_pretrained(root / "dense").eval())
    return root, logits


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder[0] / "int8")


def test_stored_bytes_are_used_as_they_are_and_decode_as_bitsandbytes_does(folder, loaded):
    stored = open_directory(folder[0] / "int8")
    kernels = loaded[1]["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert isinstance(kernels, QTensor)
    assert kernels.spec == RowInt8(threshold=5.0)
    one = jax.tree.map(lambda leaf: leaf[1], kernels)
    weight, scales = stored.read(Q), stored.read(Q.replace("weight", "SCB"))
    np.testing.assert_array_equal(np.asarray(one.codes).view(np.int8), weight)
    np.testing.assert_array_equal(one.scales[:, 0], scales)
    expected = bitsandbytes.functional.int8_vectorwise_dequant(
        torch.from_numpy(weight), torch.from_numpy(scales)
    )
    # either rounds a product and a division by 127, in another order
    np.testing.assert_allclose(one.dequantize_rows(jnp.float32), expected.numpy(), rtol=2.5e-7)


def test_products_take_activations_as_they_are_where_llm_int8_rounds_them(folder, loaded):
    model, params = loaded
    ours = np.asarray(jax.jit(bind(model))({"params": params}, jnp.asarray(IDS)).logits)
    logits = folder[1]
    spread = np.ptp(logits["dense"])
    assert np.abs(ours - logits["decoded"]).max() < 1e-4 * spread
    theirs = np.abs(logits["llm.int8"] - logits["decoded"]).max()
    assert 1e-3 * spread < theirs < 0.2 * spread


def test_it_is_saved_with_the_same_bytes_and_transformers_goes_on_with_it(folder, loaded):
    root, logits = folder
    save_pretrained(root / "again", *loaded)
    before, after = open_directory(root / "int8"), open_directory(root / "again")
    assert set(before.names()) == set(after.names())
    for name in before.names():
        assert before.info(name) == after.info(name)
        assert before.read(name).tobytes() == after.read(name).tobytes(), name
    config = json.loads((root / "again" / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_threshold"] == 5.0
    again = AutoModelForCausalLM.from_pretrained(
        root / "again", dtype=torch.float32, device_map="cpu"
    )
    np.testing.assert_array_equal(logits_of(again.eval()), logits["llm.int8"])


def test_an_adapter_merges_file_by_file_and_goes_back_to_8_bits(folder, loaded):
    root, (model, params) = folder[0], loaded
    ours = plan(model, params, LoRA(rank=2, targets=["q_proj"]))
    adapters = jax.tree.map(lambda leaf: leaf + 0.05, init(jax.random.key(0), ours))
    save_adapter(root / "adapter", ours, adapters, model=model)
    merge_checkpoint(root / "int8", root / "adapter", root / "merged")
    base = params["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    expected = base.dequantize() + delta(ours.placements[0], adapters)
    merged = open_directory(root / "merged")
    assert not any(name.endswith("SCB") for name in merged.names())
    np.testing.assert_allclose(merged.read(Q).T, expected[1], rtol=0, atol=1e-6)
    back, errors = requantize({"q_proj": {"kernel": expected}}, {"q_proj": {"kernel": base}})
    assert back["q_proj"]["kernel"].spec == base.spec
    assert 0 < errors["q_proj"] < 0.02


DAMAGE = {
    "columns": (lambda t, m: t.update({f"{m}.weight_format": np.uint8(1)}), "is 1, but 0 .rows."),
    "short": (lambda t, m: t.update({f"{m}.SCB": t[f"{m}.SCB"][:-1]}), r"\[95\], expected \[96\]"),
    "floats": (lambda t, m: t.update({Q: t[Q].astype(np.float32)}), "is float32 .* expected int8"),
    "gone": (lambda t, m: t.pop(Q), "is missing beside"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_parts_are_named(kind, folder, tmp_path):
    reader = open_directory(folder[0] / "int8")
    tensors = {name: reader.read(name) for name in reader.names()}
    spoil, message = DAMAGE[kind]
    spoil(tensors, Q.removesuffix(".weight"))
    (tmp_path / "config.json").write_text((folder[0] / "int8" / "config.json").read_text())
    write_tensors(tmp_path, {name: np.asarray(array) for name, array in tensors.items()})
    with pytest.raises(CheckpointError, match=rf"self_attn\.q_proj\.weight.*{message}"):
        load(tmp_path)
