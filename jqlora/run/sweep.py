"""A sweep: the runs of a grid, trained by one step on one base.

Its directory holds what they share, the checkpoints and the comparison; ``members/`` has a run
directory for each, whose ``config.yaml`` is that of the run on its own.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from jqlora.attach import bind
from jqlora.config import RunConfig, dump_config, read_config
from jqlora.config.grid import Grid
from jqlora.graft import CONSTANTS
from jqlora.io.atomic import atomic_write_json, atomic_write_text
from jqlora.methods import Plan
from jqlora.run import choices
from jqlora.run.carrying import carry_out, compiled_for_first, first_state
from jqlora.run.comparison import compare_members
from jqlora.run.data import check_warmup, read_records_of
from jqlora.run.session import (
    Base,
    Instruments,
    Prepared,
    Say,
    Session,
    instruments,
    measure_all,
    open_base,
    prepare,
)
from jqlora.run.sizes import plan_run
from jqlora.run.training import Outcome, finish, say_on_stderr
from jqlora.stacking import common_plan, constants, pad, widest
from jqlora.train.directory import RunDirectory
from jqlora.train.joint_batches import JointBatches
from jqlora.train.loss import Batch
from jqlora.train.state import TrainState
from jqlora.train.task_loss import loss_for
from jqlora.train.together import Together, make_joint_step
from jqlora.types import Adapters, Params


def sweep(grid: Grid, *, say: Say = say_on_stderr) -> Outcome:
    """Train all members of ``grid`` at once, into the output directory of its config.

    A member whose loss is no number is set aside, and the others go on. Raises JqloraError of the
    fitting kind for anything a user can mend.
    """
    config = choices.with_absolute_paths(grid.base)
    run = RunDirectory(config.output.directory)
    run.check(overwrite=config.output.overwrite)
    with run.locked():
        configs = _placed(run, grid.members)
        prepared = prepare_all(configs, say)
        run.clear()
        for name, member in configs.items():
            (run.members / name).mkdir(parents=True)
            atomic_write_text(run.members / name / "config.yaml", dump_config(member))
        atomic_write_json(run.sweep, {"vary": grid.vary, "members": grid.values})
        atomic_write_text(run.config, dump_config(config))
        return _train(run, configs, prepared, say)


def resume_sweep(run: RunDirectory, say: Say) -> Outcome:
    """Go on with an interrupted sweep in its directory, which is locked."""
    names = json.loads(run.sweep.read_text())["members"]
    configs = _placed(
        run, {name: read_config([run.members / name / "config.yaml"]) for name in names}
    )
    return _train(run, configs, prepare_all(configs, say), say)


def prepare_all(configs: Mapping[str, RunConfig], say: Say) -> dict[str, Prepared]:
    """All that can fail early, of every member; records are read once for each seed."""
    first, *others = configs
    found = {first: prepare(configs[first], say)}
    data = {configs[first].data_seed: found[first].data}
    say(f"{len(configs)} members on one base: {', '.join(configs)}")
    for name in others:
        config = configs[name]
        sizes, seed = plan_run(config), config.data_seed
        if seed not in data:
            data[seed] = read_records_of(config, found[first].tokenizer)
        check_warmup(config, data[seed].loader)
        choices.optimizer_of(config, sizes.plan, data[seed].loader.total_steps)
        found[name] = dataclasses.replace(found[first], sizes=sizes, data=data[seed])
    return found


def _train(
    run: RunDirectory,
    configs: Mapping[str, RunConfig],
    prepared: Mapping[str, Prepared],
    say: Say,
) -> Outcome:
    config, first = next(iter(configs.values())), next(iter(prepared.values()))
    plans = [one.sizes.plan for one in prepared.values()]
    batches = JointBatches([one.data.loader for one in prepared.values()])
    optimizers = [
        choices.optimizer_of(member, own, batches.total_steps)
        for member, own in zip(configs.values(), plans, strict=True)
    ]

    def create(params: Params) -> Together:
        each = zip(configs.values(), plans, optimizers, strict=True)
        return Together(tuple(first_state(member, own, params, tx) for member, own, tx in each))

    step = make_joint_step(
        [bind(first.sizes.model, own) for own in plans],
        optimizers,
        accumulate=config.train.accumulate,
        loss=loss_for(first.sizes.model),
        one_batch=batches.one,
        say=say,
    )
    step = compiled_for_first(run, step, create, first.sizes.params, batches)
    base = open_base(config, first, say)
    state = create(base.params)
    measures = _measures(instruments_of(config, first, base, plans), plans, state.members)
    sessions = {
        name: Session(
            configs[name], RunDirectory(run.members / name), base, own, prepared[name].data, how
        )
        for name, own, how in zip(configs, plans, measures, strict=True)
    }
    result = carry_out(
        run,
        sessions,
        state,
        members=lambda state: state.members,
        step=step,
        batches=batches,
        lost=lambda name: functools.partial(_set_aside, name, say),
        say=say,
    )
    if result.signal is not None:
        return Outcome(run.path, result.signal, None)
    say("measuring the members after training")
    for session, state in zip(sessions.values(), result.state.members, strict=True):
        if all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.adapters)):
            own = dataclasses.replace(result, state=state)
            finish(session, own, measure_all(session, state.adapters))
    return Outcome(run.path, None, compare_members(run, result))


def instruments_of(
    config: RunConfig, prepared: Prepared, base: Base, plans: Sequence[Plan]
) -> Instruments:
    """For adapters of any of ``plans`` as :func:`_measures` lays them out: one program for all."""
    return instruments(config, prepared, base, bind(base.model, common_plan(plans)))


def _measures(
    common: Instruments, plans: Sequence[Plan], states: Sequence[TrainState]
) -> list[Instruments]:
    """What measures each member: ``common``, with the member's adapters in the common shape."""
    whole = [
        {**state.adapters, CONSTANTS: constants(own)}
        for own, state in zip(plans, states, strict=True)
    ]
    shapes = widest(whole)

    def of(own: Plan) -> Instruments:
        def laid_out(adapters: Adapters) -> Adapters:
            return pad({**adapters, CONSTANTS: constants(own)}, shapes)

        return Instruments(
            evaluate=lambda adapters: common.evaluate(laid_out(adapters)),
            ask=lambda adapters: common.ask(laid_out(adapters)),
        )

    return [of(own) for own in plans]


def _placed(run: RunDirectory, members: Mapping[str, RunConfig]) -> dict[str, RunConfig]:
    """The members' configs with their directories in the sweep's."""
    found = {}
    for name, config in members.items():
        output = dataclasses.replace(config.output, directory=str(run.members / name))
        found[name] = choices.with_absolute_paths(dataclasses.replace(config, output=output))
    return found


def _set_aside(name: str, say: Say, number: int, values: dict[str, float], _: Batch) -> None:
    say(
        f"step {number}: {name} gave loss {values['loss']} and gradient norm "
        f"{values['grad_norm']}; it is set aside, the others go on"
    )
