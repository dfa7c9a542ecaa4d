"""``report.html``: one file without links, made from what the run directory holds."""

import json
from typing import Any

from jqlora.io.atomic import atomic_write_text
from jqlora.tasks import TASKS
from jqlora.train.directory import RunDirectory
from jqlora.train.metrics import read_metrics
from jqlora.train.pages import embedded, render
from jqlora.train.plots import draw_plots
from jqlora.train.rank_plots import RANK_PLOTS, draw_rank_plots
from jqlora.train.usage import readable_bytes


def write_report(run: RunDirectory, summary: dict[str, Any]) -> None:
    """Draw the plots and write the report of a finished run."""
    rows = read_metrics(run.metrics)
    images = draw_plots(rows, run.plots)
    ranks = json.loads(run.ranks.read_text()) if run.ranks.exists() else None
    if ranks is not None:
        images |= draw_rank_plots(ranks, rows, run.plots)
    measured = run.read_before_after()
    page = render(
        "jqlora.train",
        "report.html.jinja",
        title=run.path.resolve().name,
        summary=summary,
        facts=facts(summary),
        quantize=f" --quantize {summary['quantize']}" if summary["quantize"] else "",
        losses=losses(measured),
        scores=scores(measured),
        targets=targets(summary),
        answers=answers(measured),
        changed_checks=changed_checks(measured),
        plots=embedded({n: path for n, path in images.items() if n not in RANK_PLOTS}),
        rank_plots=embedded({name: images[name] for name in RANK_PLOTS if name in images}),
        config=run.config.read_text(),
        summary_json=json.dumps(summary, indent=2, ensure_ascii=False),
    )
    atomic_write_text(run.report, page)


def losses(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """One line for each evaluation: its name, and loss and perplexity before and after."""
    names = {"heldout": "held-out records", "general": "general answers"}
    before, after = measured["before"]["evaluations"], measured["after"]["evaluations"]
    return [
        {"name": names.get(kind, kind), "before": before[kind], "after": after[kind]}
        for kind in before
    ]


def scores(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """One line for each score of a task, before and after."""
    before, after = measured["before"]["evaluations"], measured["after"]["evaluations"]
    return [
        {"name": kind, "metric": metric, "before": old, "after": after[kind]["metrics"][metric]}
        for kind, found in before.items()
        for metric, old in found.get("metrics", {}).items()
    ]


def targets(summary: dict[str, Any]) -> str:
    """What a loss is a mean over."""
    task = summary["task"]
    return "tokens" if task is None or TASKS[task].kind == "texts" else "labels"


def answers(measured: dict[str, Any]) -> list[dict[str, str]]:
    """Each prompt with the model's answer before and after training."""
    before, after = measured["before"]["answers"], measured["after"]["answers"]
    return [
        {"prompt": old["prompt"], "before": old["answer"], "after": new["answer"]}
        for old, new in zip(before, after, strict=True)
    ]


def changed_checks(measured: dict[str, Any]) -> list[dict[str, str]]:
    """The general questions that were answered rightly only before, or only after."""
    pairs = zip(measured["before"]["checks"], measured["after"]["checks"], strict=True)
    return [
        {"expect": old["expect"], "before": old["answer"], "after": new["answer"]}
        for old, new in pairs
        if old["right"] != new["right"]
    ]


def facts(summary: dict[str, Any]) -> dict[str, str]:
    """The summary's numbers in words, for the table at the top."""
    device = summary["peak_device_bytes"]
    return {
        "model": summary["model"],
        "trainable parameters": (
            f"{summary['trainable_parameters']:,} of {summary['base_parameters']:,} "
            f"({100 * summary['trainable_parameters'] / summary['base_parameters']:.2f} %)"
        ),
        **rank_facts(summary),
        "base weights": (
            f"{readable_bytes(summary['base_bytes'])}, "
            f"{summary['bits_per_quantized_parameter']:.3f} bits per quantized parameter"
            if summary["bits_per_quantized_parameter"]
            else f"{readable_bytes(summary['base_bytes'])}, not quantized"
        ),
        "adapter file": readable_bytes(summary["adapter_bytes"]),
        "steps": (
            f"{summary['steps']}, {summary['learnt_tokens_per_step']:.0f} learnt "
            f"{targets(summary)} each on average"
        ),
        "speed": f"{summary['tokens_per_second']:.0f} tokens per second",
        "time": (
            f"load {summary['load_seconds']:.0f} s, compile {summary['compile_seconds']:.0f} s, "
            f"train {summary['train_seconds']:.0f} s"
        ),
        "peak memory": f"host {readable_bytes(summary['peak_host_bytes'])}"
        + ("" if device is None else f", device {readable_bytes(device)}"),
        "versions": ", ".join(f"{k} {v}" for k, v in summary["versions"].items()),
    }


def rank_facts(summary: dict[str, Any]) -> dict[str, str]:
    """What AdaLoRA did, in words; nothing for a run without it."""
    ranks = summary.get("ranks")
    if ranks is None:
        return {}
    return {
        "ranks": (
            f"{ranks['initial']:,} triplets at first, {ranks['final']:,} at last; from "
            f"{ranks['smallest']} to {ranks['largest']} a module"
        ),
        "parameters left": f"{ranks['parameters']:,}",
    }
