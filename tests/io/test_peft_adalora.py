# ruff: noqa: E402
"""AdaLoRA adapters against the real PEFT, both ways, pruned and not; and what else they become."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
import transformers
from safetensors.numpy import load_file

from jqlora.attach import bind, init, plan
from jqlora.compacting import as_lora, compact
from jqlora.errors import AdapterFileError
from jqlora.io import load
from jqlora.io.merge_files import merge_checkpoint
from jqlora.io.peft import load_adapter, save_adapter
from jqlora.merging import merge
from jqlora.methods import AdaLoRA, LoRA
from jqlora.tree import flatten, unflatten

pytestmark = [
    pytest.mark.usefixtures("compile_quickly"),
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),
]

IDS = np.arange(22).reshape(2, 11) * 7 % 64
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random Llama whose norms are not left at their ones."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2 if parameter.ndim > 1 else 0.5)
    path = str(tmp_path_factory.mktemp("llama"))
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pruned(folder):
    """A PEFT model with random triplets, some of them pruned, in one module all."""
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=5,
        target_r=3,
        lora_alpha=12,
        target_modules=TARGETS,
        total_step=10,
    )
    model = peft.get_peft_model(torch_base(folder), config)
    generator = torch.Generator().manual_seed(1)
    pattern = {}
    with torch.no_grad():
        for name, parameter in model.base_model.model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.6, generator=generator)
            if "lora_E" in name:
                kept = torch.rand(parameter.shape, generator=generator) > 0.4
                kept = kept & ("layers.1.self_attn.v_proj" not in name)
                parameter *= kept
                pattern[name] = kept.view(-1).tolist()
    model.peft_config["default"].rank_pattern = pattern
    return model.eval()


def torch_base(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def logits(model, plan, params, adapters):
    variables = {"params": params, **adapters}
    return np.asarray(jax.jit(bind(model, plan))(variables, jnp.asarray(IDS, jnp.int32)).logits)


def assert_same_logits(ours, theirs):
    assert np.abs(ours - theirs).max() <= 1e-4 * np.ptp(theirs)


@pytest.mark.parametrize("scan", [True, False])
def test_a_pruned_adapter_computes_the_same_from_each_others_files(scan, folder, pruned, tmp_path):
    expected = torch_logits(pruned)
    assert np.abs(expected - torch_logits(torch_base(folder))).max() > 0.1
    pruned.save_pretrained(tmp_path / "theirs")
    model, params = load(folder, scan=scan)
    ours, adapters = load_adapter(tmp_path / "theirs", model, params)
    assert_same_logits(logits(model, ours, params, adapters), expected)

    save_adapter(tmp_path / "ours", ours, adapters, model=model, base_model_name=folder)
    again = peft.PeftModel.from_pretrained(torch_base(folder), tmp_path / "ours")
    assert_same_logits(torch_logits(again.eval()), expected)
    theirs, mine = (
        load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours")
    )
    assert theirs.keys() == mine.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(mine[name], tensor, err_msg=name)
    theirs, mine = (
        json.loads((tmp_path / side / "adapter_config.json").read_text())
        for side in ("theirs", "ours")
    )
    assert theirs.keys() == mine.keys()
    for field in theirs.keys() - {"target_modules", "total_step"}:
        assert mine[field] == theirs[field], field
    assert sorted(mine["target_modules"]) == sorted(theirs["target_modules"])


def trained(model, params, spec):
    """A plan and random adapters, about half of whose λ are zero."""
    ours = plan(model, params, spec)
    generator = np.random.default_rng(0)
    flat = flatten(init(jax.random.key(0), ours))
    for path, leaf in flat.items():
        noise = generator.normal(0, 0.6, leaf.shape).astype(np.float32)
        if path[-1] == "lam":
            noise *= generator.random(leaf.shape) > 0.5
        flat[path] = jnp.asarray(noise)
    return ours, unflatten(flat)


def test_training_adapters_compact_ones_and_plain_lora_are_all_the_same_to_peft(folder, tmp_path):
    model, params = load(folder)
    ours, adapters = trained(model, params, AdaLoRA(init_rank=5, target_rank=3, alpha=12))
    expected = logits(model, ours, params, adapters)
    forms = {
        "as trained": (ours, adapters),
        "compact": compact(ours, adapters),
        "lora": as_lora(ours, adapters),
    }
    sizes = {}
    for name, (form, leaves) in forms.items():
        assert_same_logits(logits(model, form, params, leaves), expected)
        save_adapter(tmp_path / name, form, leaves, model=model)
        theirs = peft.PeftModel.from_pretrained(torch_base(folder), tmp_path / name).eval()
        assert_same_logits(torch_logits(theirs), expected)
        again, loaded = load_adapter(tmp_path / name, model, params)
        read, written = merge(again, params, loaded), merge(form, params, leaves)
        jax.tree.map(np.testing.assert_array_equal, read, written)
        sizes[name] = sum(
            t.size for t in load_file(tmp_path / name / "adapter_model.safetensors").values()
        )
    assert sizes["compact"] == forms["compact"][0].trainable_count < 0.7 * sizes["as trained"]
    assert isinstance(forms["lora"][0].placements[0].spec, LoRA)
    assert (
        json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    )

    merge_checkpoint(folder, tmp_path / "compact", tmp_path / "merged")
    assert_same_logits(torch_logits(torch_base(tmp_path / "merged")), expected)


def test_what_peft_cannot_say_is_refused(folder, tmp_path):
    model, params = load(folder)
    embedding, adapters = trained(model, params, AdaLoRA(targets=["embed_tokens", "q_proj"]))
    with pytest.raises(AdapterFileError, match=r"embed_tokens: PEFT's AdaLoRA adapts no embedding"):
        save_adapter(tmp_path / "no", embedding, adapters, model=model)
    save_adapter(tmp_path / "yes", *as_lora(embedding, adapters), model=model)
    theirs = peft.PeftModel.from_pretrained(torch_base(folder), tmp_path / "yes").eval()
    assert_same_logits(torch_logits(theirs), logits(model, embedding, params, adapters))

    both, adapters = trained(model, params, [AdaLoRA(targets=["q_proj"]), LoRA(targets=["v_proj"])])
    with pytest.raises(AdapterFileError, match="LoRA and AdaLoRA"):
        save_adapter(tmp_path / "no", both, adapters, model=model)
    save_adapter(tmp_path / "folded", *as_lora(both, adapters), model=model)
