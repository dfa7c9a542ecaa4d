# ruff: noqa: E402
"""Adapters against the real PEFT, both ways: what it saves we compute, what we save it computes."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
import optax
from safetensors.numpy import load_file

from jqlora.attach import bind, init, plan
from jqlora.io import load
from jqlora.io.merge_files import merge_checkpoint
from jqlora.io.peft import load_adapter, save_adapter
from jqlora.io.save import save_pretrained
from jqlora.merging import merge
from jqlora.methods import LoRA
from jqlora.methods.lora import ranks
from jqlora.tree import flatten, unflatten
from tests.io.peft_toys import FAMILIES, QV, torch_adapted, torch_base, write_checkpoint

pytestmark = [
    pytest.mark.usefixtures("compile_quickly"),
    pytest.mark.parity,
]

CASES = {
    "q and v": {"target_modules": QV},
    "all linear": {"target_modules": "all-linear"},
    "a regular expression": {"target_modules": r".*layers\.[02]\.mlp\.(up|down)_proj"},
    "patterns": {
        "target_modules": ["q_proj", "up_proj", "down_proj"],
        "rank_pattern": {r"layers.1.self_attn.q_proj": 5, "up_proj": 2},
        # PEFT writes keys in alphabetical order, and the first that matches holds
        "alpha_pattern": {r"^model.layers.0.*": 3, r"layers\.\d.mlp.up_proj": 9},
    },
    "rank stabilized": {"target_modules": QV, "use_rslora": True, "r": 7},
    "some layers": {"target_modules": QV, "layers_to_transform": [0, 2]},
    "some layers by pattern": {
        "target_modules": QV,
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "exclusions": {"target_modules": QV, "exclude_modules": ["layers.1.self_attn.q_proj"]},
    "norms trained whole": {"target_modules": QV, "modules_to_save": ["norm"]},
    "projections trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["v_proj"]},
    "gaussian": {"target_modules": QV, "init_lora_weights": "gaussian"},
}
UNTIED = {
    "the head": {"target_modules": ["lm_head", "q_proj"]},
    "the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding and head whole": {
        "target_modules": QV,
        "modules_to_save": ["embed_tokens", "lm_head"],
    },
}
TIED = {
    "the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "the embedding trained whole": {
        "target_modules": QV,
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
}
ALL = [
    *(pytest.param("llama", case, True, id=f"llama, {name}") for name, case in CASES.items()),
    *(pytest.param("llama", case, True, id=f"llama, {name}") for name, case in UNTIED.items()),
    *(pytest.param("qwen2", case, True, id=f"qwen2, {name}") for name, case in TIED.items()),
    *(
        pytest.param(family, CASES[name], scan, id=f"{family}, {name}")
        for family, scan in (("mistral", True), ("qwen2", False))
        for name in ("patterns", "projections trained whole")
    ),
]
IDS = np.arange(22).reshape(2, 11) * 7 % 64


@pytest.fixture(autouse=True)
def _silence():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One tiny random checkpoint of each family."""
    return {name: write_checkpoint(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def logits(model, plan, params, adapters):
    variables = {"params": params, **adapters}
    return np.asarray(jax.jit(bind(model, plan))(variables, jnp.asarray(IDS, jnp.int32)).logits)


def assert_same_logits(ours, theirs):
    assert np.abs(ours - theirs).max() <= 1e-4 * np.ptp(theirs)


def noisy(plan, adapters):
    """Random adapters, zero in the padding of unequal ranks."""
    generator = np.random.default_rng(0)
    flat = flatten(adapters)
    for placement in plan.placements:
        kept = np.asarray(ranks(placement)).reshape(placement.site.lead)
        for name, axis in (("a", -1), ("b", -2)):
            path = ("lora", *placement.site.path, name)
            noise = generator.normal(0, 0.3, flat[path].shape).astype(np.float32)
            keep = np.arange(noise.shape[axis]) < kept[..., None]
            flat[path] = jnp.asarray(noise * np.expand_dims(keep, -1 if axis == -2 else -2))
    return unflatten(flat)


def spec_of(case):
    """The same case in our words."""
    names = {
        "target_modules": "targets",
        "exclude_modules": "exclude",
        "use_rslora": "rank_stabilized",
        "r": "rank",
        "init_lora_weights": "init",
    }
    fields = {names.get(k, k): v for k, v in case.items()}
    fields.pop("ensure_weight_tying", None)
    fields.pop("layers_pattern", None)
    return LoRA(**{"rank": 4, "alpha": 8, **fields})


@pytest.mark.parametrize(("family", "case", "scan"), ALL)
def test_peft_and_this_compute_the_same_from_each_others_files(
    family, case, scan, checkpoints, tmp_path
):
    theirs = torch_adapted(checkpoints[family], case)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = torch_logits(theirs)
    assert np.abs(expected - torch_logits(torch_base(checkpoints[family]))).max() > 0.1
    model, params = load(checkpoints[family], scan=scan)
    loaded, adapters = load_adapter(tmp_path / "theirs", model, params)
    assert_same_logits(logits(model, loaded, params, adapters), expected)

    # our own spec in the same words means the same plan
    ours = plan(model, params, spec_of(case))
    assert ours.table() == loaded.table()

    save_adapter(tmp_path / "ours", ours, adapters, model=model)
    again = peft.PeftModel.from_pretrained(torch_base(checkpoints[family]), tmp_path / "ours")
    assert_same_logits(torch_logits(again.eval()), expected)


def test_adapters_in_bfloat16_are_the_same_on_both_sides(checkpoints, tmp_path):
    theirs = torch_adapted(checkpoints["llama"], CASES["q and v"])
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = load(checkpoints["llama"])
    ours, adapters = load_adapter(tmp_path / "theirs", model, params, dtype="bfloat16")
    save_adapter(tmp_path / "ours", ours, adapters, model=model)
    again = peft.PeftModel.from_pretrained(torch_base(checkpoints["llama"]), tmp_path / "ours")
    loaded = peft.get_peft_model_state_dict(again)
    for name, tensor in peft.get_peft_model_state_dict(theirs).items():
        assert torch.equal(loaded[name], tensor.float()), name
    found = logits(model, ours, params, adapters)
    assert_same_logits(found, torch_logits(again.eval()))


QUERIES = LoRA(rank=2, alpha=3, targets=["q_proj"], rank_pattern={"layers.1.self_attn.q_proj": 5})
SOME_DOWN = LoRA(rank=4, alpha=8, targets=["down_proj"], layers_to_transform=[1, 2])
THE_REST = LoRA(rank=3, alpha=1)


@pytest.mark.parametrize("specs", [[QUERIES, SOME_DOWN], [QUERIES, THE_REST]])
def test_several_specs_become_one_that_peft_reads(specs, checkpoints, tmp_path):
    model, params = load(checkpoints["llama"])
    ours = plan(model, params, specs)
    adapters = noisy(ours, init(jax.random.key(0), ours))
    save_adapter(tmp_path / "adapter", ours, adapters, model=model)
    theirs = peft.PeftModel.from_pretrained(
        torch_base(checkpoints["llama"]), tmp_path / "adapter"
    ).eval()
    assert_same_logits(logits(model, ours, params, adapters), torch_logits(theirs))


@pytest.mark.parametrize(
    ("family", "case"),
    [
        ("llama", UNTIED["the embedding"] | {"modules_to_save": ["norm"]}),
        ("qwen2", CASES["patterns"]),
    ],
)
def test_merged_files_compute_the_same_in_transformers(family, case, checkpoints, tmp_path):
    theirs = torch_adapted(checkpoints[family], case)
    theirs.save_pretrained(tmp_path / "adapter")
    expected = torch_logits(theirs)
    model, params = load(checkpoints[family])
    loaded, adapters = load_adapter(tmp_path / "adapter", model, params)
    save_pretrained(tmp_path / "merged", model, merge(loaded, params, adapters))
    assert_same_logits(torch_logits(torch_base(tmp_path / "merged")), expected)

    merge_checkpoint(
        checkpoints[family], tmp_path / "adapter", tmp_path / "sharded", max_shard_bytes=9999
    )
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert_same_logits(torch_logits(torch_base(tmp_path / "sharded")), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_read_and_written_again_holds_the_same(family, checkpoints, tmp_path):
    case = CASES["patterns"] | {"modules_to_save": ["norm"]}
    torch_adapted(checkpoints[family], case).save_pretrained(tmp_path / "theirs")
    model, params = load(checkpoints[family])
    plan, adapters = load_adapter(tmp_path / "theirs", model, params)
    save_adapter(
        tmp_path / "ours", plan, adapters, model=model, base_model_name=checkpoints[family]
    )
    theirs, ours = (
        load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours")
    )
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor)
    theirs, ours = (
        json.loads((tmp_path / side / "adapter_config.json").read_text())
        for side in ("theirs", "ours")
    )
    assert theirs.keys() == ours.keys()
    for field, value in theirs.items():
        unordered = sorted(value) if field == "target_modules" else value
        mine = sorted(ours[field]) if field == "target_modules" else ours[field]
        assert mine == unordered, field


def torch_losses(model, steps):
    """Losses of AdamW steps on the mean cross-entropy, and the first gradients by PEFT's names."""
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2, weight_decay=0.01)
    ids, losses, first = torch.tensor(IDS), [], {}
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        first = first or {n: p.grad.numpy().copy() for n, p in trainable.items()}
        optimizer.step()
        losses.append(loss.item())
    return np.asarray(losses), first


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gradients_and_ten_steps_of_training_agree_with_peft(family, checkpoints, tmp_path):
    theirs = torch_adapted(checkpoints[family], CASES["patterns"])
    theirs.save_pretrained(tmp_path / "adapter")
    model, params = load(checkpoints[family])
    ours, adapters = load_adapter(tmp_path / "adapter", model, params)
    expected, first = torch_losses(theirs, 10)
    ids = jnp.asarray(IDS, jnp.int32)
    apply = bind(model, ours)

    def loss(adapters, params):
        logits = apply({"params": params, **adapters}, ids).logits[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    tx = optax.adamw(1e-2, eps=1e-8, weight_decay=0.01)

    @jax.jit
    def step(adapters, state, params):
        value, gradient = jax.value_and_grad(loss)(adapters, params)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes counts and floats
            updates, state = tx.update(gradient, state, adapters)
        return optax.apply_updates(adapters, updates), state, value, gradient

    state, losses, gradient = tx.init(adapters), [], None
    for _ in range(10):
        adapters, state, value, latest = step(adapters, state, params)
        gradient = gradient or latest
        losses.append(float(value))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert expected[-1] < 0.9 * expected[0]

    save_adapter(tmp_path / "gradient", ours, gradient, model=model)
    saved = load_file(tmp_path / "gradient" / "adapter_model.safetensors")
    assert len(saved) == len(first)
    for name, tensor in saved.items():
        theirs_is = first[name.replace("_A.", "_A.default.").replace("_B.", "_B.default.")]
        assert np.abs(tensor - theirs_is).max() <= 1e-4 * np.abs(theirs_is).max(), name
