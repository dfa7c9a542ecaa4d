"""Adapters trained together: each as it would be alone, on a base that is read once."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jqlora as jq
from jqlora import optim
from jqlora.optim.offload import offload
from jqlora.optim.residence import is_undecided, marked, residence
from jqlora.train.together import Together, make_joint_step
from tests import toy_models

pytestmark = pytest.mark.usefixtures("compile_quickly")

STEPS, ROWS, LENGTH = 3, 2, 8
MODEL = toy_models.Toy(scan=True)
ROUNDING = 1e-5
"""Of the largest number of a leaf: adapters after STEPS updates, whose products are added up in
another order and whose smallest moments Adam divides by their own size; 10 times what was seen."""
SPECS = [
    jq.LoRA(rank=5, alpha=3, dropout=0.2, targets=["up"]),
    jq.AdaLoRA(init_rank=3, target_rank=2, targets=["up", "head"]),
]


@pytest.fixture(scope="module")
def params():
    return toy_models.params_of(MODEL)


@pytest.fixture(scope="module")
def members(params):
    """``(apply, optimizer)`` of each; they differ in all that may differ."""
    applies = [jq.bind(MODEL, jq.plan(MODEL, params, spec, toy_models.IDS)) for spec in SPECS]
    allotted = {"total_steps": STEPS, "initial_steps": 1, "final_steps": 1, "interval": 1}
    optimizers = [
        optim.adamw(optim.cosine(1e-2, steps=9, warmup=2), weight_decay=0.1),
        optim.adalora(optim.lion(2e-2, max_grad_norm=0.5), applies[1].plan, **allotted),
    ]
    return list(zip(applies, optimizers, strict=True))


def fresh(members):
    return [
        jq.TrainState.create(jq.init(jax.random.key(n), apply.plan), tx, jax.random.key(9 + n))
        for n, (apply, tx) in enumerate(members)
    ]


def batch(seed):
    """Rows of int32 [ROWS, LENGTH]."""
    drawn = np.random.default_rng(seed).integers(0, toy_models.VOCABULARY, (ROWS, LENGTH))
    return {"ids": drawn.astype(np.int32)}


def loss(apply, variables, batch, key):
    """Of repeating the token before."""
    logits = apply(variables, batch["ids"], key=key)[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["ids"][:, :-1])
    return losses.sum(), jnp.float32(losses.size)


def test_each_member_is_left_with_the_state_of_its_own_steps(params, members):
    step = make_joint_step(*zip(*members, strict=True), loss=loss, one_batch=False)
    state, logged = Together(tuple(fresh(members))), []
    batches = [[batch((number, n)) for n in range(len(SPECS))] for number in range(STEPS)]
    for several in batches:
        stacked = {name: np.stack([one[name] for one in several]) for name in several[0]}
        state, metrics = step(state, params, stacked)
        logged.append(metrics)
    assert int(state.step) == STEPS
    for n, (member, alone) in enumerate(zip(members, fresh(members), strict=True)):
        own = jq.make_train_step(*member, loss=loss)
        for number in range(STEPS):
            alone, metrics = own(alone, params, batches[number][n])
            assert metrics.keys() == logged[number][n].keys()
            for name, value in metrics.items():
                np.testing.assert_allclose(logged[number][n][name], value, rtol=1e-6, err_msg=name)
        theirs = jax.random.key_data(alone.key), jax.tree.structure(alone)
        ours = jax.random.key_data(state.members[n].key), jax.tree.structure(state.members[n])
        assert ours[0].tolist() == theirs[0].tolist()
        assert ours[1] == theirs[1]
        for found, expected in zip(
            jax.tree.leaves(state.members[n].adapters), jax.tree.leaves(alone.adapters), strict=True
        ):
            np.testing.assert_allclose(found, expected, atol=ROUNDING * np.abs(expected).max())


def test_what_optimizers_leave_open_is_decided_for_all_at_once(params, members):
    apply, said = members[0][0], []
    tx = optax.chain(offload(optax.scale_by_adam(), smallest=9), marked(open=True))
    step = make_joint_step([apply, apply], [tx, tx], loss=loss, device_bytes=1000, say=said.append)
    state = Together(tuple(fresh([(apply, tx)] * 2)))
    assert is_undecided(state)
    state, _ = step(state, params, batch(0))
    assert not is_undecided(state)
    assert residence(state.members[0]).host == residence(state.members[1]).host > 0
    assert ["in host memory" in line for line in said] == [True]


def test_codes_are_decoded_once_for_all_members(params, members):
    stored = jax.eval_shape(lambda base: jq.quantize_params(base, jq.NF4()), params)
    states = fresh(members)
    joint = make_joint_step(*zip(*members, strict=True), loss=loss)
    together = program(joint, Together(tuple(states)), stored)
    alone = program(jq.make_train_step(*members[0], loss=loss), states[0], stored)
    assert decodes(together) == decodes(alone) > 0
    rows = len(SPECS) * ROWS * LENGTH
    wide = rf"f32\[{rows},\d+\] = dot_general"
    assert len(re.findall(wide, together)) >= decodes(together)


def program(step, state, params):
    return str(jax.make_jaxpr(lambda *arguments: step(*arguments))(state, params, batch(0)))


def decodes(text):
    """How often codes are taken apart."""
    return len(re.findall(r"u8\[[\d,]+\] = shift_right_logical", text))


def test_the_program_keeps_one_copy_of_the_base(params, members):
    joint = make_joint_step(*zip(*members, strict=True), loss=loss)
    text = program(joint, Together(tuple(fresh(members))), params)
    sizes = {leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim > 2}
    copies = [f"f32[{','.join(map(str, (len(SPECS), *shape)))}]" for shape in sizes]
    assert not [copy for copy in copies if copy in text]
