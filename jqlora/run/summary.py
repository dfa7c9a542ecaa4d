"""``summary.json``: what a run was, what it did, and what it cost."""

import dataclasses
import datetime
import json
import statistics
from typing import Any

from jqlora.compacting import compact
from jqlora.config import AdaLoRAConfig, RunConfig
from jqlora.methods import Plan
from jqlora.optim.residence import residence
from jqlora.quant import footprint
from jqlora.train.directory import RunDirectory
from jqlora.train.loop import Fit
from jqlora.train.metrics import read_metrics
from jqlora.train.usage import device_peak_bytes, host_peak_bytes, versions
from jqlora.types import Params


def summarize(
    config: RunConfig,
    run: RunDirectory,
    *,
    plan: Plan,
    params: Params,
    fit: Fit,
    load_seconds: float,
) -> dict[str, Any]:
    """All numbers of a finished run; ``heldout`` and ``general`` have ``before`` and ``after``;
    ``general_answers`` counts the answers that say what their records expect; ``ranks`` is what
    AdaLoRA left; ``optimizer_bytes`` are those of its state on the device and on the host. A run on
    a ``task`` has ``validation`` with its ``metrics``, and counts labels where others count tokens.

    ``tokens_per_second`` is the median over the logged steps and counts every token but padding.
    ``train_seconds`` has neither compilation nor evaluation nor saving in it; a resumed run adds
    up, while the other times and the peaks are those of the process that finished it.
    """
    base = footprint(params)
    measured = run.read_before_after()
    rows = [row for row in read_metrics(run.metrics) if row["kind"] == "train"]
    before, after = measured["before"], measured["after"]
    losses = {
        name: {"before": found, "after": after["evaluations"][name]}
        for name, found in before["evaluations"].items()
    }
    if before["checks"]:
        losses["general_answers"] = {
            "asked": len(before["checks"]),
            "right_before": sum(check["right"] for check in before["checks"]),
            "right_after": sum(check["right"] for check in after["checks"]),
        }
    return {
        "model": config.model.source,
        "method": _method(config),
        "quantize": _quantize(config),
        "task": config.data.task,
        "optimizer": config.train.optimizer,
        "optimizer_bytes": dataclasses.asdict(residence(fit.state.opt_state)),
        "steps": int(fit.state.step),
        **losses,
        "final_train_loss": rows[-1]["loss"],
        "trainable_parameters": plan.trainable_count,
        **_ranks(run, plan, fit),
        "base_parameters": base.quantized_params + base.other_params,
        "base_bytes": base.bytes,
        "bits_per_quantized_parameter": round(base.bits_per_quantized_param, 4),
        "adapter": str(run.adapter),
        "adapter_bytes": sum(p.stat().st_size for p in run.adapter.glob("*.safetensors")),
        "tokens_per_second": round(statistics.median(row["tokens_per_second"] for row in rows), 1),
        "learnt_tokens_per_step": round(sum(row["tokens"] for row in rows) / len(rows), 1),
        "load_seconds": round(load_seconds, 2),
        "compile_seconds": round(fit.compile_seconds, 2),
        "train_seconds": round(fit.train_seconds, 2),
        "peak_host_bytes": host_peak_bytes(),
        "peak_device_bytes": device_peak_bytes(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }


def _ranks(run: RunDirectory, plan: Plan, fit: Fit) -> dict[str, Any]:
    """``ranks`` of a run with AdaLoRA: triplets at first and at last, smallest and largest rank of
    a module, and the parameters left when pruned ones are taken out."""
    if not run.ranks.exists():
        return {}
    modules = json.loads(run.ranks.read_text())["modules"].values()
    left = [sum(module["kept"]) for module in modules]
    return {
        "ranks": {
            "initial": sum(len(module["kept"]) for module in modules),
            "final": sum(left),
            "smallest": min(left),
            "largest": max(left),
            "parameters": compact(plan, fit.state.adapters)[0].trainable_count,
        }
    }


def _method(config: RunConfig) -> str:
    method, quantize = config.method, config.model.quantize
    stored = "" if quantize is None else f"{quantize.scheme.upper()} base, "
    if isinstance(method, AdaLoRAConfig):
        target = method.target_total_rank
        goal = f"a mean of {method.target_rank}" if target is None else f"{target} in all"
        return f"{stored}adalora rank {method.init_rank} to {goal}, alpha {method.alpha:g}"
    return f"{stored}{method.name} rank {method.rank}, alpha {method.alpha:g}"


def _quantize(config: RunConfig) -> str | None:
    """The word for the base's storage that ``--quantize`` takes; None for a base kept whole."""
    chosen = config.model.quantize
    if chosen is None:
        return None
    return f"{chosen.scheme}-dq" if chosen.double_quant else chosen.scheme
