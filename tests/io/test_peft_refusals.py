# ruff: noqa: E402
"""Adapters' files that are damaged, of another model, or ask for what is not supported."""

import dataclasses
import json
import re
import shutil
import warnings

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from safetensors.numpy import load_file, save_file

from jqlora.errors import AdapterFileError, SaveError
from jqlora.io import load
from jqlora.io.peft import load_adapter, save_adapter
from tests.io.peft_toys import QV, torch_adapted, write_checkpoint

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

REFUSED = {
    "peft_type": ("IA3", "'LORA' or 'ADALORA'"),
    "use_dora": (True, "False only"),
    "bias": ("all", "'none' only"),
    "lora_bias": (True, "False only"),
    "trainable_token_indices": ([1, 2], "None only"),
    "target_parameters": (["experts.gate"], "None only"),
    "init_lora_weights": ("pissa", "path_initial_model_for_weight_conversion"),
    "a_field_of_the_future": ({"x": 1}, "None only"),
    "target_modules": (None, "names of modules"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def loaded(base):
    return load(base)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_adapted(base, {"target_modules": QV}).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(adapter, tmp_path):
    """A copy to be damaged, and a function that rewrites its config and its tensors."""
    shutil.copytree(adapter, tmp_path / "copy")

    def rewrite(fields=(), tensors=lambda tensors: tensors):
        config = tmp_path / "copy" / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | dict(fields)))
        file = tmp_path / "copy" / "adapter_model.safetensors"
        save_file(tensors(load_file(file)), file)
        return tmp_path / "copy"

    return rewrite


@pytest.mark.parametrize("field", REFUSED)
def test_what_is_not_supported_is_refused_by_field_and_value(field, copy, loaded):
    value, accepted = REFUSED[field]
    model, params = loaded
    message = rf"adapter_config.json: {field}={re.escape(repr(value))}; accepted: .*{accepted}"
    with pytest.raises(AdapterFileError, match=message):
        load_adapter(copy({field: value}), model, params)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
DAMAGES = {
    "missing": (
        lambda t: {n: x for n, x in t.items() if n != Q0},
        rf"adapter_model.safetensors lacks 1 tensors for this model: {Q0}",
    ),
    "surplus": (
        lambda t: {**t, Q0.replace("layers.0", "layers.7"): t[Q0]},
        r"has surplus 1 tensors for this model: .*layers.7",
    ),
    "misshapen": (
        lambda t: {**t, Q0: np.ascontiguousarray(t[Q0][:3])},
        rf"{Q0} has shape \(3, 32\), expected \(4, 32\)",
    ),
}


@pytest.mark.parametrize(("change", "message"), DAMAGES.values(), ids=DAMAGES)
def test_tensors_that_do_not_fit_are_named(change, message, copy, loaded):
    model, params = loaded
    with pytest.raises(AdapterFileError, match=message):
        load_adapter(copy(tensors=change), model, params)


def test_an_adapter_of_another_model_is_refused(adapter, base):
    model, params = load(base, scan=False)
    small = dataclasses.replace(
        model, config=dataclasses.replace(model.config, num_hidden_layers=2)
    )
    params = {**params, "model": {k: v for k, v in params["model"].items() if k != "layers_2"}}
    with pytest.raises(AdapterFileError, match=r"has surplus 4 tensors .*layers\.2"):
        load_adapter(adapter, small, params)


def test_an_empty_or_truncated_directory_is_refused(copy, loaded, tmp_path):
    model, params = loaded
    with pytest.raises(AdapterFileError, match=r"cannot read .*adapter_config.json"):
        load_adapter(tmp_path / "nowhere", model, params)
    folder = copy()
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(AdapterFileError, match="truncated"):
        load_adapter(folder, model, params)
    weights.unlink()
    with pytest.raises(AdapterFileError, match=r"neither adapter_model.safetensors nor"):
        load_adapter(folder, model, params)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterFileError, match="is no JSON"):
        load_adapter(folder, model, params)


def test_a_head_apart_from_its_tied_embedding_is_refused(tmp_path):
    tied = write_checkpoint("qwen2", tmp_path / "base")
    case = {"target_modules": QV, "modules_to_save": ["lm_head"]}
    torch_adapted(tied, case).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterFileError, match=r"ensure_weight_tying=false gives the output head"):
        load_adapter(tmp_path / "adapter", *load(tied))


def test_names_of_modules_that_this_model_lacks_are_passed_over_as_peft_does(copy, loaded):
    model, params = loaded
    fields = {"target_modules": [*QV, "c_attn"], "rank_pattern": {"c_attn": 2}, "r": 4}
    found, _ = load_adapter(copy(fields), model, params)
    assert found.placements[0].spec.targets == tuple(QV)


def test_an_adapter_in_torchs_own_format_is_read_too(adapter, loaded, tmp_path):
    model, params = loaded
    expected = load_adapter(adapter, model, params)
    shutil.copy(adapter / "adapter_config.json", tmp_path)
    tensors = load_file(adapter / "adapter_model.safetensors")
    torch.save({n: torch.tensor(t) for n, t in tensors.items()}, tmp_path / "adapter_model.bin")
    found = load_adapter(tmp_path, model, params)
    assert found[0] == expected[0]
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])


def test_saving_replaces_an_adapter_but_no_other_directory(adapter, loaded, tmp_path):
    model, params = loaded
    found, adapters = load_adapter(adapter, model, params)
    save_adapter(tmp_path / "adapter", found, adapters, model=model)
    save_adapter(tmp_path / "adapter", found, adapters, model=model)
    (tmp_path / "adapter" / "thesis.tex").write_text("years of work")
    with pytest.raises(SaveError, match=r"thesis\.tex"):
        save_adapter(tmp_path / "adapter", found, adapters, model=model)
    assert (tmp_path / "adapter" / "thesis.tex").exists()
