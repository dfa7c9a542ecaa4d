"""The command that certifies a checkpoint: what passes, what does not, and what it says then."""

import json
import re
import sys

import jax
import numpy as np
import pytest

from jqlora.cli import main
from jqlora.compare.measure import measure
from jqlora.compare.observation import Observation

pytestmark = [
    pytest.mark.usefixtures("compile_quickly", "keep_programs"),
    pytest.mark.filterwarnings("ignore"),  # of transformers and PEFT
]
SMALL = ["--steps", "2", "--batch", "2", "--length", "10", "--rank", "2"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A Llama of two layers with a tokenizer, and an adapter for it in PEFT's format."""
    from jqlora import LoRA, init, load, plan, save_adapter
    from tests.toy_checkpoint import write_model

    folder = tmp_path_factory.mktemp("toy")
    model, params = load(write_model(folder / "model", intermediate_size=64))
    planned = plan(model, params, LoRA(rank=3, targets=["q_proj", "down_proj"]))
    adapters = jax.tree.map(
        lambda leaf: 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape),
        init(jax.random.key(0), planned),
    )
    save_adapter(folder / "adapter", planned, adapters, model=model)
    return folder


def certificate(out):
    return json.loads((out / "certificate.json").read_text())


@pytest.mark.parity
def test_a_decoder_passes_in_fp32_and_its_files_go_both_ways(toy, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    words = ["compare", str(toy / "model"), "--out", str(tmp_path), "--round-trip", *SMALL]
    assert main(words) == 0
    found = certificate(tmp_path)
    assert found["passed"]
    assert found["first_difference"] is None
    names = {}
    for one in found["measurements"]:
        names.setdefault(one["quantity"], []).append(one["name"])
    assert names["hidden states"] == [
        "embeddings before model.layers",
        "model.layers.0",
        "model.layers.1",
    ]
    assert len(names["gradients"]) == 2 * 2 * 7
    assert names["adapters"] == ["all 28 leaves that have a gradient"]
    assert "model.layers.1.mlp.down_proj.lora_B" in names["gradients"][0]
    assert [name.split()[0] for name in names["files"]] == ["adapter", "adapter", "round"]
    assert len(found["losses"]["ours"]) == len(found["losses"]["theirs"]) == 2
    assert {"torch", "peft", "jax"} <= found["versions"].keys()
    page = (tmp_path / "certificate.html").read_text()
    assert "Passed" in page
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "passed  Hidden states" in capsys.readouterr().out


@pytest.mark.parity
def test_a_quantized_base_with_an_adapter_passes_on_the_users_own_texts(toy, tmp_path):
    pytest.importorskip("bitsandbytes")
    (tmp_path / "texts").write_text("one line\n\nand another line\n")
    words = ["compare", str(toy / "model"), "--adapter", str(toy / "adapter"), "--quantized"]
    assert main([*words, "--text", str(tmp_path / "texts"), "--out", str(tmp_path), *SMALL]) == 0
    found = certificate(tmp_path)
    assert "NF4" in found["quantized"]
    assert "double_quant=True" in found["quantized"]
    assert found["inputs"]["origin"] == "2 texts"
    leaves = [one for one in found["measurements"] if one["quantity"] == "gradients"]
    assert len(leaves) == 2 * 2 * 2
    assert "codes as bitsandbytes makes them: 14 weights" in [
        one["name"] for one in found["measurements"]
    ]


@pytest.mark.parity
def test_an_encoder_passes_in_bf16_where_the_other_sides_own_error_is_the_budget(tmp_path):
    pytest.importorskip("bitsandbytes")
    from tests.models import encoders

    encoders.checkpoint("bert", encoders.SEQUENCE).hf.save_pretrained(tmp_path / "model")
    words = ["compare", str(tmp_path / "model"), "--dtype", "bfloat16", "--out", str(tmp_path)]
    assert main([*words, *SMALL]) == 0
    found = certificate(tmp_path)
    assert found["losses"].keys() == {"ours", "theirs", "theirs in float32"}
    assert found["inputs"]["origin"] == "random ids, seed 0"
    assert any(one["name"].endswith("classifier.weight") for one in found["measurements"])
    hidden = [one for one in found["measurements"] if one["quantity"] == "hidden states"]
    assert all(one["relative"] > 1e-4 for one in hidden[1:])  # it is bf16 indeed


@pytest.mark.parity
def test_a_bf16_base_is_run_as_its_trainer_runs_it_under_autocast(toy):
    pytest.importorskip("bitsandbytes")
    import torch

    from jqlora.compare import torch_side
    from jqlora.compare.inputs import make_inputs
    from jqlora.compare.observation import Recipe
    from jqlora.io import describe
    from jqlora.io.source import resolve

    source, seen = resolve(str(toy / "model")), set()
    model, _ = describe(source)
    base = torch_side.open_base(source, model.task, "bfloat16")
    adapted = torch_side.adapted(base, toy / "adapter")
    for name, module in adapted.named_modules():
        if name.endswith(("lora_A.default", "lora_B.default")):
            assert module.weight.dtype == torch.float32
            module.register_forward_hook(lambda module, x, y: seen.add(y.dtype))
    batches = make_inputs(model, None, rows=2, length=10).batches
    torch_side.observe(adapted, batches, Recipe(steps=1))
    assert seen == {torch.bfloat16}


@pytest.mark.parity
def test_the_exact_result_is_nowhere_rounded_to_fp32(toy):
    pytest.importorskip("bitsandbytes")
    from jqlora.compare import torch_side
    from jqlora.compare.inputs import make_inputs
    from jqlora.compare.observation import Recipe
    from jqlora.io import describe
    from jqlora.io.source import resolve

    source = resolve(str(toy / "model"))
    model, _ = describe(source)
    batches = make_inputs(model, None, rows=2, length=10).batches

    def loss(dtype):
        base = torch_side.open_base(source, model.task, "float32")
        adapted = torch_side.exact(torch_side.adapted(base, toy / "adapter"), dtype)
        return torch_side.observe(adapted, batches, Recipe(steps=1)).losses[0]

    narrow, wide = loss("float32"), loss("float64")
    assert float(np.float32(narrow)) == narrow
    assert float(np.float32(wide)) != wide  # transformers takes logits to fp32 for the loss
    assert abs(narrow - wide) < 1e-6 * wide


def test_a_state_that_is_massive_hides_no_other():
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(2, 16, 32)).astype(np.float32)
    exact[0, 0, 0] = 2e4
    noise = rng.normal(size=(2, *exact.shape)).astype(np.float32) / 64

    def error(ours):
        seen = (
            Observation({"hidden_states": [states]}, {}, {"a": np.ones(4)}, [1.0], {}, {"a": exact})
            for states in (ours, exact + noise[1], exact)
        )
        mine, theirs, true = seen
        found = measure(mine, theirs, dtype="bfloat16", stacks=["layers"], exact=true)
        return next(one for one in found if one.quantity == "hidden states")

    near = exact + noise[0]
    massive, others = near.copy(), exact + 2 * noise[0]
    massive[0, 0, 0] += 100
    others[0, 0, 0] = 2e4
    assert error(near).passed
    assert error(massive).passed
    assert not error(others).passed


@pytest.mark.parity
def test_one_weight_that_differs_fails_and_the_first_layer_after_it_is_named(
    toy, tmp_path, capsys, monkeypatch
):
    torch = pytest.importorskip("torch")
    pytest.importorskip("bitsandbytes")
    from jqlora.compare import torch_side

    plain = torch_side.open_base

    def perturbed(*args):
        model = plain(*args)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 5] += 0.05
        return model

    monkeypatch.setattr(torch_side, "open_base", perturbed)
    assert main(["compare", str(toy / "model"), "--out", str(tmp_path), *SMALL]) == 1
    assert "first difference: hidden states, model.layers.1\n" in capsys.readouterr().out
    found = certificate(tmp_path)
    assert not found["passed"]
    assert found["first_difference"]["name"] == "model.layers.1"
    states = [one for one in found["measurements"] if one["quantity"] == "hidden states"]
    assert [one["passed"] for one in states] == [True, True, False]
    page = (tmp_path / "certificate.html").read_text()
    assert "Failed" in page
    assert "hidden states, model.layers.1</strong>" in page


def test_without_torch_the_extra_to_install_is_named(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jqlora.compare.torch_side", None)
    monkeypatch.delattr("jqlora.compare.torch_side", raising=False)
    assert main(["compare", str(toy / "model"), "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'jqlora[parity]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_inputs_are_the_same_every_time_and_have_padding(toy):
    from jqlora.compare.inputs import make_inputs
    from jqlora.io import describe, load_tokenizer

    model, _ = describe(str(toy / "model"))
    tokenizer = load_tokenizer(str(toy / "model"))
    for given in (tokenizer, None):
        one, two = (make_inputs(model, given, rows=4, length=20) for _ in range(2))
        for left, right in zip(one.batches, two.batches, strict=True):
            np.testing.assert_array_equal(left.ours["input_ids"], right.ours["input_ids"])
        shown = np.concatenate([batch.shown for batch in one.batches])
        assert shown.any(1).all()
        assert not shown.all(1).all()
        theirs = one.batches[0].theirs
        np.testing.assert_array_equal(theirs["labels"] >= 0, one.batches[0].shown)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--length", "1000"], "2 to 256 tokens"),
        (["--steps", "0"], "at least one step"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--batch", "0"], "at least one row"),
    ],
)
@pytest.mark.parity
def test_a_mistake_is_said_before_anything_is_loaded(words, expected, toy, capsys):
    pytest.importorskip("bitsandbytes")
    assert main(["compare", str(toy / "model"), *words]) == 2
    assert expected in capsys.readouterr().err
