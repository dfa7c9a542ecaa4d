"""What a planned run will hold in memory, from shapes alone: nothing is allocated."""

import dataclasses
import math
from typing import Any

import jax

from jqlora.attach import init, plan
from jqlora.config import AdaLoRAConfig, RunConfig
from jqlora.methods import Plan
from jqlora.optim.adalora import allocated, budget_of
from jqlora.optim.budget import Budget
from jqlora.optim.residence import planned, planned_residence
from jqlora.quant import footprint
from jqlora.quant.params import Footprint
from jqlora.run import choices
from jqlora.run.data import check_length
from jqlora.run.head import Chosen, choose, describe_model
from jqlora.train.usage import readable_bytes
from jqlora.types import Params


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The model, the plan, and what base, adapters and optimizer state weigh."""

    chosen: Chosen
    model: Any
    params: Params
    """Shapes."""
    plan: Plan
    budget: Budget | None
    """Of AdaLoRA."""
    base: Footprint
    adapter_bytes: int
    optimizer_bytes: int
    """On the device."""
    host_bytes: int = 0
    """Optimizer state in host memory."""
    movable_bytes: int = 0
    """Of ``optimizer_bytes``, what goes to the host where the first step finds no room for it."""
    steps_known: bool = True
    """Whether the budget's steps are those of the run; the data tell what epochs make."""

    @property
    def base_parameters(self) -> int:
        return self.base.quantized_params + self.base.other_params

    def lines(self) -> list[str]:
        """The totals in sentences."""
        trainable = self.plan.trainable_count
        share = 100 * trainable / self.base_parameters
        held = self.base.bytes + self.adapter_bytes + self.optimizer_bytes
        return [
            f"base       {self.base}",
            f"trainable  {trainable:,} of {self.base_parameters:,} parameters ({share:.2f} %)",
            f"memory     base {readable_bytes(self.base.bytes)} + adapters "
            f"{readable_bytes(self.adapter_bytes)} + optimizer "
            f"{readable_bytes(self.optimizer_bytes)} = {readable_bytes(held)}, "
            "and activations beside them",
            *self._offloaded(),
            *self._ranks(),
        ]

    def _offloaded(self) -> list[str]:
        """Where else the optimizer's state lives, or may."""
        if self.host_bytes:
            return [
                f"host       {readable_bytes(self.host_bytes)} of optimizer state, streamed "
                "through every update"
            ]
        if self.movable_bytes:
            return [
                f"host       up to {readable_bytes(self.movable_bytes)} of optimizer state, as the "
                "first step finds room on the device"
            ]
        return []

    def _ranks(self) -> list[str]:
        """AdaLoRA's budget in a sentence."""
        if self.budget is None:
            return []
        budget, modules = self.budget, sum(sum(p.layers) for p in allocated(self.plan))
        means = (
            f"{budget.initial / modules:.1f} a module to {budget.target / modules:.1f} on average"
        )
        if not self.steps_known:
            return [
                f"ranks      {budget.initial:,} triplets, cut every {budget.interval} steps of the "
                f"middle of the run to {budget.target:,}: {means}"
            ]
        return [
            f"ranks      {budget.initial:,} triplets until step {budget.initial_steps}, cut every "
            f"{budget.interval} steps to {budget.target:,} at step {budget.frozen_from} of "
            f"{budget.total_steps}: {means}",
        ]


def plan_run(config: RunConfig, *, weightless: bool = False) -> Sizes:
    """Plan the config's adapters on its model, of which only the files' headers are read; with
    ``weightless`` there may be none but a config.json.

    Raises what ``jq.load`` and ``jq.plan`` raise, and DataError for rows longer than the model.
    """
    chosen = choose(config)
    model, params = describe_model(config, chosen, weightless=weightless)
    check_length(config, model)
    sites = plan(model, params, choices.adapter_spec(chosen.method))
    dtype = config.method.dtype
    adapters = jax.eval_shape(lambda b: init(jax.random.key(0), sites, b, dtype=dtype), params)
    # how many steps the epochs make is not known before the data are read
    steps = config.train.steps or 2**17
    budget = None
    if isinstance(config.method, AdaLoRAConfig):
        budget = budget_of(sites, **choices.rank_schedule(config.method, steps))
    tx = choices.optimizer_of(config, sites, steps)
    state = planned_residence(*planned(tx.init, adapters))
    open = config.train.offload == "auto"
    return Sizes(
        chosen=chosen,
        model=model,
        params=params,
        plan=sites,
        budget=budget,
        base=footprint(params),
        adapter_bytes=size_of(adapters),
        optimizer_bytes=state.device + (state.host if open else 0),
        host_bytes=0 if open else state.host,
        movable_bytes=state.host if open else 0,
        steps_known=config.train.steps is not None,
    )


def table(planned: Plan) -> str:
    """The plan's sites as aligned text."""
    rows = planned.table()
    columns = list(rows[0])
    cells = [columns] + [[_cell(row[name]) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def size_of(tree: Any) -> int:
    """Bytes of a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
