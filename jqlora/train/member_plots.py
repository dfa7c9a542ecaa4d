"""The members of a sweep in one picture each: how they learnt, and how they ended."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jqlora.train.metrics import Row
from jqlora.train.plots import save_figure, smoothed, tidy

IN_THE_LEGEND = 12
"""Members that a legend can name and still be read."""


def draw_member_plots(
    logs: Mapping[str, Sequence[Row]], ranked_by: str, directory: str | Path
) -> dict[str, Path]:
    """Write ``training``, and ``evaluation`` where the members were evaluated; returns their paths.

    ``logs`` are the rows of each member's ``metrics.jsonl``, ``ranked_by`` the evaluation to show.
    """
    kinds = {"training": "train"}
    if any(row["kind"] == ranked_by for rows in logs.values() for row in rows):
        kinds["evaluation"] = ranked_by
    paths = {}
    for name, kind in kinds.items():
        figure = Figure(figsize=(7.2, 4.2), dpi=130, layout="constrained")
        axes = figure.add_subplot()
        _draw(axes, logs, kind)
        axes.set_title("Loss in training" if kind == "train" else f"Loss on {kind}", loc="left")
        paths[name] = save_figure(figure, Path(directory) / f"{name}.png")
    return paths


def _draw(axes: Axes, logs: Mapping[str, Sequence[Row]], kind: str) -> None:
    colours = colormaps["viridis"].resampled(max(2, len(logs)))
    for number, (member, rows) in enumerate(logs.items()):
        found = [(row["step"], row["loss"]) for row in rows if row["kind"] == kind]
        steps, losses = zip(*found, strict=True) if found else ((), ())
        if kind == "train" and losses:
            losses = smoothed(losses, min(len(losses), max(1, len(losses) // 15) | 1))
        marker = "" if kind == "train" and len(steps) > 1 else "o"
        axes.plot(steps, losses, label=member, color=colours(number), linewidth=1.5, marker=marker)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    tidy(axes)
    if len(logs) <= IN_THE_LEGEND:
        axes.legend(frameon=False, fontsize="small")
