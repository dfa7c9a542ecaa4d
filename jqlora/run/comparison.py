"""A finished sweep's members beside each other: a table, pictures, and which is best."""

import csv
import datetime
import io
import json
from pathlib import Path
from typing import Any

from jqlora.io.atomic import atomic_write_json, atomic_write_text
from jqlora.train.directory import RunDirectory
from jqlora.train.loop import Fit
from jqlora.train.metrics import read_metrics
from jqlora.train.pages import embedded, render
from jqlora.train.usage import device_peak_bytes, host_peak_bytes, versions

TRAINING = "training"
"""What members are ranked by where nothing is held out: the loss of the last step."""


def compare_members(run: RunDirectory, result: Fit) -> dict[str, Any]:
    """Write ``results.csv``, plots, report and summary of a sweep; returns the summary.

    ``members`` are in the order of their loss on ``ranked_by``, the best first, the name of which
    is ``best``; it is the first evaluation, or the last training loss where there is none. A member
    that diverged has no losses, but ``diverged_after``, the last step logged.
    """
    from jqlora.train.member_plots import draw_member_plots  # matplotlib, only now

    grid = json.loads(run.sweep.read_text())
    members = [_member(run.members / name, name, own) for name, own in grid["members"].items()]
    finished = [member for member in members if "losses" in member]
    ranked_by = next(iter(finished[0]["losses"])) if finished else TRAINING
    finished.sort(key=lambda member: member["losses"][ranked_by])
    summary = {
        "vary": grid["vary"],
        "ranked_by": ranked_by,
        "best": finished[0]["name"] if finished else None,
        "members": [*finished, *(member for member in members if "losses" not in member)],
        "steps": int(result.state.step),
        "compile_seconds": round(result.compile_seconds, 2),
        "train_seconds": round(result.train_seconds, 2),
        "peak_host_bytes": host_peak_bytes(),
        "peak_device_bytes": device_peak_bytes(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }
    header, rows = table_of(summary)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    atomic_write_text(run.results, text.getvalue())
    logs = {name: read_metrics(run.members / name / "metrics.jsonl") for name in grid["members"]}
    plots = draw_member_plots(logs, ranked_by, run.plots)
    page = render(
        "jqlora.train",
        "sweep.html.jinja",
        title=run.path.resolve().name,
        summary=summary,
        header=header,
        rows=[[_shown(cell) for cell in row] for row in rows],
        plots=embedded(plots),
        config=run.config.read_text(),
    )
    atomic_write_text(run.report, page)
    atomic_write_json(run.summary, summary)
    return summary


def table_of(summary: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows of the comparison, the best member first; a list is one cell, as JSON."""
    keys = list(summary["vary"])
    losses = list(summary["members"][0].get("losses", {}))
    rows = [
        [
            member["name"],
            *(_cell(member["values"][key]) for key in keys),
            *(member["losses"][name] if "losses" in member else "diverged" for name in losses),
            member.get("trainable_parameters", ""),
        ]
        for member in summary["members"]
    ]
    return ["member", *keys, *(f"{name} loss" for name in losses), "parameters"], rows


def lines_of(summary: dict[str, Any]) -> list[str]:
    """The comparison as aligned text."""
    header, rows = table_of(summary)
    cells = [header, *([_shown(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def _member(folder: Path, name: str, values: dict[str, Any]) -> dict[str, Any]:
    own = RunDirectory(folder)
    if not own.summary.exists():
        steps = [row["step"] for row in read_metrics(own.metrics) if row["kind"] == "train"]
        return {"name": name, "values": values, "diverged_after": max(steps, default=0)}
    summary = json.loads(own.summary.read_text())
    measured = own.read_before_after()["after"]["evaluations"]
    losses = {kind: found["loss"] for kind, found in measured.items()}
    return {
        "name": name,
        "values": values,
        "losses": losses | {TRAINING: summary["final_train_loss"]},
        "trainable_parameters": summary["trainable_parameters"],
        "adapter": summary["adapter"],
    }


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) or value is None else value


def _shown(cell: Any) -> str:
    if isinstance(cell, bool | str):
        return str(cell)
    return f"{cell:,}" if isinstance(cell, int) else f"{cell:.5g}"
