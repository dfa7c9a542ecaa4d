"""What every method must do on every form of model, dense and quantized. One row adds a method."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jqlora.attach import bind, init, plan
from jqlora.errors import NoSiteMatched
from jqlora.graft import dense
from jqlora.io.peft import load_adapter, save_adapter
from jqlora.merging import merge
from jqlora.methods import AdaLoRA, LoRA, method_of
from jqlora.models.layers import scan_to_loop
from jqlora.optim import adalora
from jqlora.quant import NF4, GroupInt, is_qtensor
from jqlora.train import TrainState, make_train_step
from tests import toy_models
from tests.storages import stored_params
from tests.toy_models import FORMS, IDS

pytestmark = pytest.mark.usefixtures("compile_quickly")

# Everything about a method that the relations below need: a spec for any model.
METHODS = {
    "lora": LoRA(rank=3, alpha=6),
    "lora on everything": LoRA(
        rank=2, alpha=3, targets=r".*", rank_pattern={r"layers\.1\..*": 4}, rank_stabilized=True
    ),
    "adalora": AdaLoRA(init_rank=4, target_rank=2, alpha=8, orthogonality_weight=0.1),
}
# The rank axis of each method's leaves, along which layers of smaller rank are padded.
RANK_AXES = {"a": -1, "b": -2, "p": -1, "lam": -1, "q": -2}
STORAGES = {
    "dense": None,
    "nf4": NF4(block=32),
    "nf4 twice": NF4(block=32, double_quant=True),
    "gptq": GroupInt(format="gptq_v2", group=32, ordered=True),
}
# Attention's kernels are no plain matrices; the other forms alternate between the storages.
QUANTIZED = {
    "loop": "nf4",
    "scan": "nf4 twice",
    "scan and remat": "nf4",
    "experts": "nf4 twice",
    "llama": "gptq",
    "llama loop": "nf4",
}
GRID = [
    *(("lora", form, "dense") for form in ("loop", "experts", "attention", "llama")),
    *(("lora", form, QUANTIZED[form]) for form in ("loop", "experts", "llama")),
    ("lora on everything", "attention", "dense"),
    ("lora on everything", "scan and remat", "nf4"),
    ("adalora", "experts", "gptq"),
    ("adalora", "llama", "nf4 twice"),
]
grid = pytest.mark.parametrize(
    "case", [pytest.param(row, id=", ".join(row)) for row in GRID], indirect=True
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One cell of the grid; expensive results are computed once and shared by the relations."""

    method: str
    form: str
    storage: str

    @property
    def model(self):
        return FORMS[self.form]

    @property
    def spec(self):
        return METHODS[self.method]

    @functools.cached_property
    def params(self):
        params = toy_models.params_of(self.model)
        spec = STORAGES[self.storage]
        return params if spec is None else stored_params(params, spec, skip=("head", "lm_head"))

    @functools.cached_property
    def plan(self):
        return plan(self.model, self.params, self.spec, IDS)

    @functools.cached_property
    def start(self):
        return init(jax.random.key(3), self.plan)

    @functools.cached_property
    def adapters(self):
        """Off their start but not so far that rounding is amplified; zero where padding is."""
        generator = np.random.default_rng(5)
        shapes = jax.eval_shape(lambda: init(jax.random.key(0), self.plan))
        return mask_padding(
            self.plan,
            jax.tree.map(lambda s: generator.normal(0, 0.08, s.shape).astype(np.float32), shapes),
        )

    @functools.cached_property
    def outputs(self):
        """Logits and the gradient of a loss in the adapters, in every way that must give the same.

        All are one program: what the ways have in common is compiled once.
        """
        bound = bind(self.model, self.plan)
        ways = {"bound": (bound, self.params), "merged": (self.merged, self.params)}
        if self.storage != "dense":
            ways["dequantized"] = (bound, jax.tree.map(dense, self.params, is_leaf=is_qtensor))

        @jax.jit
        def every(bases, adapters):
            return {
                name: logits_and_gradient(ways[name][0], params, adapters[name])
                for name, params in bases.items()
            }

        bases = {name: params for name, (_, params) in ways.items()}
        return every(bases, dict.fromkeys(ways, self.adapters))

    @property
    def output(self):
        return self.outputs["bound"]

    def merged(self, variables, ids):
        adapters = {k: v for k, v in variables.items() if k != "params"}
        return self.model.apply({"params": merge(self.plan, variables["params"], adapters)}, ids)


def logits_and_gradient(apply, params, adapters):
    def loss(adapters):
        logits = apply({"params": params, **adapters}, IDS)
        return (logits.astype(jnp.float32) ** 2).mean(), logits

    (_, logits), gradient = jax.value_and_grad(loss, has_aux=True)(adapters)
    return logits, gradient


def mask_padding(plan, adapters):
    """Zero what layers of smaller rank do not use, in place."""
    for placement in plan.placements:
        ranks = np.reshape(method_of(placement.spec).ranks(placement), placement.site.lead)
        node = adapters[method_of(placement.spec).collection]
        for name in placement.site.path:
            node = node[name]
        for leaf in node:
            axis = RANK_AXES[leaf]
            keep = np.arange(node[leaf].shape[axis]) < ranks[..., None]
            node[leaf] = jnp.asarray(node[leaf] * np.expand_dims(keep, -1 if axis == -2 else -2))
    return adapters


def assert_close(left, right, tolerance):
    """Every leaf within ``tolerance`` of its own largest entry."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        scale = max(float(np.abs(y).max()), 1e-6)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * scale)


cases = functools.cache(Case)


@pytest.fixture
def case(request):
    return cases(*request.param)


@grid
def test_at_the_start_the_model_is_the_base_model(case):
    @jax.jit
    def both(params, start):
        adapted = bind(case.model, case.plan)({"params": params, **start}, IDS)
        return adapted, bind(case.model)({"params": params}, IDS)

    np.testing.assert_array_equal(*both(case.params, case.start))


@grid
def test_the_effect_equals_merged_weights_forward_and_backward(case):
    assert_close(case.output, case.outputs["merged"], 2e-5)


@grid
def test_quantized_computes_what_its_dequantized_weights_do(case):
    if case.storage == "dense":
        pytest.skip("nothing is quantized")
    assert_close(case.output, case.outputs["dequantized"], 2e-5)


@grid
def test_a_scanned_model_computes_what_the_loop_does(case):
    if not getattr(case.model, "scan", False) or case.form == "scan and remat":
        pytest.skip("not the plain scanned form")
    loop = dataclasses.replace(case.model, scan=False)
    params, adapters = scan_to_loop(case.params), scan_to_loop(case.adapters)
    spec = plan(loop, params, case.spec, IDS)
    # a loop's leaves are as wide as its own layer needs, a stack's as the widest
    adapters = jax.tree.map(
        lambda leaf, like: leaf[tuple(map(slice, like.shape))],
        adapters,
        jax.eval_shape(lambda: init(jax.random.key(0), spec)),
    )
    logits = jax.jit(bind(loop, spec))({"params": params, **adapters}, IDS)
    assert_close(case.output[0], logits, 2e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_remat_changes_nothing(method, storage):
    kept = cases(method, "scan", storage)
    remat = Case(method, "scan and remat", storage)
    assert remat.plan == kept.plan
    ways = [bind(case.model, kept.plan) for case in (remat, kept)]

    @jax.jit
    def both(*variables):
        return [logits_and_gradient(way, *v) for way, v in zip(ways, variables, strict=True)]

    variables = (kept.params, kept.adapters)
    assert_close(*both(variables, variables), 1e-6)


@grid
def test_training_learns_a_planted_target_leaves_params_alone_and_compiles_once(case):
    target = case.output[0]
    before = jax.tree.map(np.array, case.params)
    traces = []

    def loss(apply, variables, batch, key):
        traces.append(1)
        error = apply(variables, batch["ids"], key=key) - batch["target"]
        return (error**2).mean(), jnp.ones(())

    tx = optax.adam(2e-2)
    if isinstance(case.spec, AdaLoRA):
        tx = adalora(tx, case.plan, total_steps=30, initial_steps=5, final_steps=10, interval=3)
    step = make_train_step(bind(case.model, case.plan), tx, loss=loss)
    state = TrainState.create(jax.tree.map(jnp.array, case.start), tx, jax.random.key(2))
    losses, first = [], 0
    for _ in range(30):
        state, metrics = step(state, case.params, {"ids": IDS, "target": target})
        losses.append(float(metrics["loss"]))
        first = first or len(traces)
    assert len(traces) == first
    assert losses[-1] < 0.7 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, case.params, before)
    # padding of unequal ranks has no gradient, so it never leaves zero
    trained = jax.tree.map(np.array, state.adapters)
    masked = mask_padding(case.plan, jax.tree.map(np.array, state.adapters))
    jax.tree.map(np.testing.assert_array_equal, trained, masked)


@pytest.mark.parametrize(
    ("scan", "dtype"), [(True, "float32"), (False, "float32"), (True, "bfloat16")]
)
@pytest.mark.parametrize("method", METHODS)
def test_saved_and_restored_adapters_compute_the_same_and_are_all_that_is_saved(
    method, scan, dtype, tmp_path
):
    model = toy_models.llama(scan=scan)
    params = toy_models.params_of(model)
    ours = plan(model, params, METHODS[method], IDS)
    adapters = mask_padding(
        ours,
        jax.tree.map(
            lambda leaf: np.array(leaf) + leaf.dtype.type(0.1),
            init(jax.random.key(0), ours, dtype=dtype),
        ),
    )
    save_adapter(tmp_path / "adapter", ours, adapters, model=model)
    assert {file.suffix for file in (tmp_path / "adapter").iterdir()} == {".json", ".safetensors"}
    again, restored = load_adapter(tmp_path / "adapter", model, params, dtype=dtype)
    jax.tree.map(np.testing.assert_array_equal, restored, adapters)
    assert {leaf.dtype for leaf in jax.tree.leaves(restored)} == {jnp.dtype(dtype)}
    assert again.table() == ours.table()
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    numbers = jnp.dtype(dtype).itemsize * ours.trainable_count
    assert numbers <= size < numbers + 200 * 100


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_half_precision_models_keep_their_dtype_and_adapters_keep_theirs(method, form, dtype):
    model = dataclasses.replace(FORMS[form], dtype=jnp.bfloat16)
    params = jax.eval_shape(
        lambda p: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), p),
        toy_models.params_of(FORMS[form]),
    )
    ours = plan(model, params, METHODS[method], IDS)
    adapters = jax.eval_shape(lambda: init(jax.random.key(0), ours, dtype=dtype))
    logits, gradient = jax.eval_shape(
        functools.partial(logits_and_gradient, bind(model, ours)), params, adapters
    )
    base = jax.eval_shape(bind(model), {"params": params}, IDS)
    assert logits.dtype == base.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((adapters, gradient))} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_a_target_that_matches_nothing_is_an_error_with_near_misses(method, form):
    model = FORMS[form]
    name = {"llama": "q_proj", "llama loop": "q_proj"}.get(form, "down")
    wrong = dataclasses.replace(METHODS[method], targets=[name.replace("o", "0")], rank_pattern=())
    with pytest.raises(NoSiteMatched, match=rf"{wrong.targets[0]}.*nearest: .*{name}"):
        plan(model, toy_models.params_of(model), wrong, IDS)


@pytest.mark.parametrize("form", ["loop", "scan and remat", "experts", "attention", "llama"])
@pytest.mark.parametrize("method", METHODS)
def test_dropout_needs_a_key_and_is_its_function(method, form):
    case = cases(method, form, "dense")
    spec = dataclasses.replace(case.spec, dropout=0.5)
    apply = bind(case.model, plan(case.model, case.params, spec, IDS))

    @jax.jit
    def every(variables, others, key):
        expected = bind(case.model, case.plan)(others, IDS)
        return expected, apply(variables, IDS), apply(variables, IDS, key=key)

    variables = {"params": case.params, **case.adapters}
    (expected, whole, first), (_, same, second), (_, _, again) = (
        every(variables, variables, jax.random.key(k)) for k in (1, 2, 1)
    )
    # without a key nothing is dropped
    np.testing.assert_array_equal(whole, same)
    assert_close(whole, expected, 2e-5)
    np.testing.assert_array_equal(first, again)
    assert np.abs(np.asarray(first) - np.asarray(second)).max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_dropout_does_not_move_the_mean(method):
    spec = dataclasses.replace(METHODS[method], dropout=0.3)
    case = cases(method, "scan", "dense")
    placement = dataclasses.replace(case.plan.placements[-1], spec=spec)
    row = method_of(spec)
    shapes = {"a": (4, 2), "b": (2, 3), "p": (4, 2), "lam": (1, 2), "q": (2, 3), "scale": ()}
    leaves = {name: jnp.ones(shape) for name, shape in shapes.items()}
    leaves["dropout"] = jnp.float32(spec.dropout)
    x, y = jnp.arange(1.0, 5.0), jnp.zeros(3)
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.vmap(lambda key: row.effect(x, y, leaves, placement, key))(keys)
    exact = row.effect(x, y, leaves, placement, None)
    error = np.abs(drawn.mean(0) - exact)
    assert (error <= 5 * drawn.std(0) / np.sqrt(len(keys))).all()
    assert drawn.std(0).min() > 0
