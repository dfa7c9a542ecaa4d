"""The allocation of ranks: its schedule, what it keeps, and that nothing of it can go missing."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jqlora import optim
from jqlora.attach import bind, init, plan
from jqlora.errors import ConfigError
from jqlora.methods import AdaLoRA, LoRA
from jqlora.models.layers import scan_to_loop
from jqlora.optim.adalora import CONVENTIONS, allocation_of, kept_by_module
from jqlora.optim.budget import Budget
from jqlora.train import TrainState, make_train_step
from jqlora.train.checkpoint import Checkpoints
from jqlora.tree import flatten
from tests import toy_models
from tests.toy_models import FORMS, IDS

pytestmark = pytest.mark.usefixtures("compile_quickly")

SCHEDULE = {"total_steps": 40, "initial_steps": 6, "final_steps": 12, "interval": 3}
BUDGET = Budget(initial=36, target=18, **SCHEDULE)


def test_the_budget_falls_by_a_cubic_from_all_to_the_target_and_stays():
    budgets = [BUDGET.after(t) for t in range(41)]
    assert budgets[:7] == [36] * 7
    assert budgets[28:] == [18] * 13
    assert all(a >= b for a, b in itertools.pairwise(budgets))
    assert budgets[17] == int(18 + 18 * 0.5**3)  # half way
    chosen = [t for t in range(41) if BUDGET.chooses(t)]
    assert chosen == [9, 12, 15, 18, 21, 24, 27, 28]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"initial_steps": 28}, "initial_steps=28 and final_steps=12 leave none of the 40 steps"),
        ({"initial_steps": 90}, "initial_steps=90 .* their sum must be below 40"),
        ({"target": 36}, "target of 36 triplets must lie between 1 and 35, below the 36"),
        ({"target": 50}, "target of 50 triplets must lie between 1 and 35"),
        ({"target": 0}, "target of 0 triplets"),
        ({"interval": 0}, "interval=0 must be at least 1"),
        ({"final_steps": -1}, "final_steps=-1 must be at least 0"),
        ({"total_steps": 0}, "total_steps=0 must be at least 1"),
    ],
)
def test_a_schedule_that_cannot_be_is_an_error_with_its_numbers(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(BUDGET, **change)


class Three(nn.Module):
    """Three matrices of which each sees the same input."""

    @nn.compact
    def __call__(self, x):
        return [nn.Dense(16, use_bias=False, name=f"d{i}")(x) for i in range(3)]


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_planted_ranks_are_recovered(convention):
    # what has to be learnt has rank 4 in the first matrix, 1 in the second and 0 in the third
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.normal(size=(64, 16)), jnp.float32)
    model = Three()
    params = model.init(jax.random.key(0), x)["params"]
    planted = [
        generator.normal(size=(16, r)) @ generator.normal(size=(r, 16)) / 4 for r in (4, 1, 0)
    ]
    targets = [
        x @ (params[f"d{i}"]["kernel"] + jnp.asarray(p, jnp.float32)) for i, p in enumerate(planted)
    ]
    spec = AdaLoRA(init_rank=6, target_rank=2, alpha=6, targets=["d0", "d1", "d2"])
    ours = plan(model, params, dataclasses.replace(spec, orthogonality_weight=0.01), x)

    def loss(apply, variables, batch, key):
        outputs = apply(variables, batch["x"])
        errors = [((y - t) ** 2).mean() for y, t in zip(outputs, targets, strict=True)]
        return sum(errors), jnp.ones(())

    tx = optim.adalora(
        optax.adam(2e-2),
        ours,
        total_steps=300,
        initial_steps=40,
        final_steps=100,
        interval=5,
        target_total_rank=5,
        convention=convention,
    )
    step = make_train_step(bind(model, ours), tx, loss=loss)
    state = TrainState.create(init(jax.random.key(1), ours), tx, jax.random.key(2))
    for _ in range(300):
        state, metrics = step(state, params, {"x": x})
    left = {k: int(np.count_nonzero(v["lam"])) for k, v in state.adapters["adalora"].items()}
    assert left == {"d0": 4, "d1": 1, "d2": 0}
    assert metrics["loss"] < 1e-3
    assert metrics["budget"] == metrics["rank"] == 5


def batches(count):
    generator = np.random.default_rng(0)
    return [{"ids": generator.integers(0, 17, (2, 5)).astype(np.int32)} for _ in range(count)]


def next_token_loss(apply, variables, batch, key):
    logits = apply(variables, batch["ids"], key=key)[:, :-1]
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["ids"][:, 1:])
    return each.sum(), jnp.asarray(float(each.size))


@dataclasses.dataclass
class Training:
    """A run on a toy model: its step, its start, and the state after every update, on the host."""

    model: nn.Module
    spec: AdaLoRA = AdaLoRA(init_rank=4, target_rank=2, alpha=8)  # noqa: RUF009 - frozen
    params: dict | None = None

    def __post_init__(self):
        self.params = self.params or toy_models.params_of(self.model)
        self.plan = plan(self.model, self.params, self.spec, IDS)
        self.tx = optim.adalora(optim.adamw(1e-2), self.plan, **SCHEDULE)
        self.step = make_train_step(bind(self.model, self.plan), self.tx, loss=next_token_loss)

    def start(self):
        return TrainState.create(init(jax.random.key(1), self.plan), self.tx, jax.random.key(2))

    def run(self, state, steps):
        after = []
        for number in steps:
            state, _ = self.step(state, self.params, batches(40)[number])
            after.append(jax.tree.map(np.asarray, state.replace(key=0)))
        return state, after


@pytest.fixture(scope="module")
def scanned():
    training = Training(FORMS["scan"])
    training.state, training.after = training.run(training.start(), range(40))
    return training


def lams(state):
    return {p[1:-1]: v for p, v in flatten(state.adapters).items() if p[-1] == "lam"}


def test_every_phase_runs_in_one_program_and_ranks_follow_the_budget(scanned):
    assert scanned.step._cache_size() == 1
    total = sum(leaf.size for leaf in lams(scanned.after[0]).values())
    budget = Budget(initial=total, target=total // 2, **SCHEDULE)
    for t, state in enumerate(scanned.after, start=1):
        left = sum(np.count_nonzero(leaf) for leaf in lams(state).values())
        kept = sum(leaf.sum() for leaf in jax.tree.leaves(state.opt_state.kept))
        assert state.opt_state.budget == budget.after(t)
        if budget.chooses(t) or t > budget.frozen_from:
            assert left == kept == budget.after(t)
        else:
            assert left == total  # pruned triplets are trained again until the next choice


def test_the_last_pattern_is_frozen(scanned):
    frozen = [state.opt_state.kept for state in scanned.after[27:]]
    for pattern in frozen[1:]:
        jax.tree.map(np.testing.assert_array_equal, pattern, frozen[0])


@pytest.mark.parametrize("stop", [14, 33])
def test_a_run_resumed_from_a_checkpoint_is_bit_identical(stop, scanned, tmp_path):
    state, _ = scanned.run(scanned.start(), range(stop))
    Checkpoints(tmp_path).save(state, {})
    restored, _ = Checkpoints(tmp_path).restore_latest(scanned.start())
    _, after = scanned.run(restored, range(stop, 40))
    jax.tree.map(np.testing.assert_array_equal, after, scanned.after[stop:])


def test_a_stack_of_layers_is_allotted_as_its_layers_would_be(scanned):
    loop = Training(FORMS["loop"], params=scan_to_loop(scanned.params))
    state, _ = loop.run(loop.start(), range(28))
    stacked = scan_to_loop({"kept": scanned.after[27].opt_state.kept})["kept"]
    assert flatten(stacked).keys() == flatten(state.opt_state.kept).keys()
    jax.tree.map(np.testing.assert_array_equal, stacked, dict(state.opt_state.kept))


def test_layers_without_adapters_take_no_part(scanned):
    some = Training(FORMS["scan"], dataclasses.replace(scanned.spec, layers_to_transform=[1]))
    state, after = some.run(some.start(), range(28))
    assert after[0].opt_state.budget == 4 * len(lams(state))
    for path, kept in kept_by_module(state.opt_state).items():
        if path[0] == "layers":
            assert not kept[0].any()


def two_matrices(total, convention="peft", **schedule):
    """A transformation on two matrices of four triplets each, with nothing in them, and their
    leaves."""
    model = FORMS["loop"]
    params = toy_models.params_of(model)
    ours = plan(model, params, AdaLoRA(init_rank=4, target_rank=2, targets=["up"]), IDS)
    tx = optim.adalora(
        optax.sgd(1.0),
        ours,
        **{"initial_steps": 0, "interval": 1, **schedule},
        target_total_rank=total,
        convention=convention,
    )
    return tx, jax.tree.map(jnp.zeros_like, init(jax.random.key(0), ours))


def kept_at_last(values, total, convention):
    """The λ after the last choice, where the triplets of two matrices have these scores."""
    tx, adapters = two_matrices(total, convention, total_steps=3, final_steps=1)
    gradients = jax.tree.map(jnp.zeros_like, adapters)
    for i, row in enumerate(values):
        lam = jnp.asarray(row, jnp.float32)[None]
        adapters["adalora"][f"layers_{i}"]["up"]["lam"] = lam
        # -λ of gradient doubles λ through the update, so the weights after it are alike in order
        gradients["adalora"][f"layers_{i}"]["up"]["lam"] = -lam
    state = tx.init(adapters)
    for _ in range(2):
        updates, state = tx.update(gradients, state, adapters)
    after = optax.apply_updates(adapters, updates)["adalora"]
    return [(np.asarray(after[f"layers_{i}"]["up"]["lam"])[0] / 2).tolist() for i in range(2)]


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_one_threshold_serves_all_modules(convention):
    values = [[1.0, 2.0, 8.0, 9.0], [3.0, 4.0, 5.0, 6.0]]
    assert kept_at_last(values, 3, convention) == [[0, 0, 8, 9], [0, 0, 0, 6]]


def test_at_ties_peft_prunes_all_and_the_paper_keeps_the_budget():
    values = [[1.0, 5.0, 5.0, 9.0], [1.0, 1.0, 5.0, 2.0]]
    assert kept_at_last(values, 2, "peft") == [[0, 0, 0, 9], [0, 0, 0, 0]]
    assert kept_at_last(values, 2, "paper") == [[0, 5, 0, 9], [0, 0, 0, 0]]


def test_a_pruned_triplet_returns_when_it_becomes_important():
    tx, adapters = two_matrices(3, total_steps=20, final_steps=1)
    gradients = jax.tree.map(jnp.zeros_like, adapters)
    first = adapters["adalora"]["layers_0"]["up"]
    first["p"] = jnp.ones_like(first["p"])
    for other in adapters["adalora"]["layers_1"]["up"], first:
        other["lam"] = jnp.ones_like(other["lam"])
    state, lams, kept = tx.init(adapters), [], []
    for t in range(1, 20):
        order = [4.0, 3.0, 2.0, 1.0] if t < 12 else [2.0, 4.0, 6.0, 8.0]
        slope = gradients["adalora"]["layers_0"]["up"]
        slope["p"] = jnp.zeros_like(first["p"]) + 1e-2 * jnp.asarray(order)[None]
        slope["lam"] = -1e-3 * jnp.ones_like(slope["lam"])
        updates, state = tx.update(gradients, state, adapters)
        adapters = optax.apply_updates(adapters, updates)
        kept.append(np.asarray(kept_by_module(state)["layers_0", "up"])[0])
        lams.append(np.asarray(adapters["adalora"]["layers_0"]["up"]["lam"])[0])
    assert kept[10].tolist() == [True, True, True, False]
    assert kept[-1][3]
    assert kept[-1].sum() == 3
    for pattern, lam in zip(kept, lams, strict=True):
        np.testing.assert_array_equal(lam != 0, pattern)


def test_what_is_missing_is_said_before_anything_is_trained(scanned):
    apply, adapters = bind(scanned.model, scanned.plan), init(jax.random.key(0), scanned.plan)
    plain = optax.adam(1e-2)
    with pytest.raises(ConfigError, match=r"allots no ranks: wrap it as jq\.optim\.adalora"):
        make_train_step(apply, plain, loss=next_token_loss)(
            TrainState.create(adapters, plain, jax.random.key(0)), scanned.params, batches(1)[0]
        )
    with pytest.raises(ConfigError, match="apply lost the penalty that adalora asks for"):
        make_train_step(lambda *a, **k: apply(*a, **k), scanned.tx, loss=next_token_loss)(
            scanned.start(), scanned.params, batches(1)[0]
        )


def test_arguments_that_make_no_sense_are_refused(scanned):
    lora = plan(scanned.model, scanned.params, LoRA(rank=2), IDS)
    wrap = optax.adam(1e-2), scanned.plan
    for arguments, change, message in (
        ((wrap[0], lora), {}, "needs a plan with jq.AdaLoRA"),
        (wrap, {"convention": "folklore"}, "convention='folklore': known are paper, peft"),
        (wrap, {"betas": (0.85, 1.0)}, r"betas=\(0.85, 1.0\)"),
        (wrap, {"target_total_rank": 400}, "target of 400 triplets"),
    ):
        with pytest.raises(ConfigError, match=message):
            optim.adalora(*arguments, **SCHEDULE, **change)
    tx = optim.adalora(*wrap, **SCHEDULE)
    adapters = init(jax.random.key(0), scanned.plan)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(adapters, tx.init(adapters))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_updates_and_state_keep_their_dtypes(convention, dtype, scanned):
    tx = optim.adalora(optim.adamw(0.1), scanned.plan, **SCHEDULE, convention=convention)
    adapters = jax.tree.map(lambda x: x.astype(dtype), init(jax.random.key(0), scanned.plan))
    with jax.numpy_dtype_promotion("standard"):  # as make_train_step has it
        updates, after = jax.eval_shape(tx.update, adapters, tx.init(adapters), adapters)
    for before, found in ((adapters, updates), (tx.init(adapters), after)):
        kinds = (jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (before, found))
        assert next(kinds) == next(kinds)


def test_extra_arguments_reach_the_inner_transformation(scanned):
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = optim.adalora(inner, scanned.plan, **SCHEDULE)
    adapters = init(jax.random.key(0), scanned.plan)
    _, state = tx.update(adapters, tx.init(adapters), adapters, value=3.0)
    assert seen == {"value": 3.0}
    assert allocation_of((optax.EmptyState(), state)) is state
