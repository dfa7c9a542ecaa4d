"""``ranks.json``: what AdaLoRA left of each module, and the scores by which it chose.

    {"init_rank": 12, "modules": {"model.layers.0.self_attn.q_proj":
        {"kept": [true, false, ...], "scores": [1.2e-9, ...]}, ...}}

Scores are those of the last update (:mod:`jqlora.optim.sensitivity`).
"""

from typing import Any

import numpy as np

from jqlora.methods import Plan
from jqlora.optim.adalora import allocated, allocation_of, kept_by_module, scores_by_module
from jqlora.types import PyTree


def rank_record(plan: Plan, opt_state: PyTree) -> dict[str, Any] | None:
    """The content of ``ranks.json``; None for a run without AdaLoRA."""
    state, placements = allocation_of(opt_state), allocated(plan)
    if state is None or not placements:
        return None
    kept, scores = kept_by_module(state), scores_by_module(state)
    modules = {}
    for placement in placements:
        site = placement.site
        rows = [np.asarray(x[site.path]).reshape(len(site.names), -1) for x in (kept, scores)]
        for name, flags, values in zip(site.names, *rows, strict=True):
            if name in placement.names:
                modules[name] = {"kept": flags.tolist(), "scores": values.tolist()}
    return {"init_rank": max(p.spec.init_rank for p in placements), "modules": modules}
