"""Curves of a run as PNG files, drawn from the rows of ``metrics.jsonl`` alone."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jqlora.io.atomic import atomic_write_bytes
from jqlora.train.metrics import Row

BLUE, ORANGE, GREEN, GREY = "#2563a8", "#d9731a", "#2e8b57", "#9aa5b1"
EVALUATION_COLOURS = {"heldout": ORANGE, "general": GREEN}


def draw_plots(rows: Sequence[Row], directory: str | Path) -> dict[str, Path]:
    """Write ``loss``, ``learning_rate``, ``grad_norm`` and ``throughput``, and the ``scores`` of a
    task; returns their paths."""
    paths = {}
    plots = PLOTS | ({"scores": _draw_scores} if any("metrics" in row for row in rows) else {})
    for name, draw in plots.items():
        figure = Figure(figsize=(7.2, 3.6), dpi=130, layout="constrained")
        axes = figure.add_subplot()
        draw(axes, rows)
        axes.set_xlabel("step")
        tidy(axes)
        paths[name] = save_figure(figure, Path(directory) / f"{name}.png")
    return paths


def tidy(axes: Axes) -> None:
    """A faint grid, and no frame at the top and the right."""
    axes.grid(alpha=0.3, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, at once or not at all; returns its path."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    atomic_write_bytes(path, buffer.getvalue())
    return path


def smoothed(values: Sequence[float], window: int) -> np.ndarray:
    """Centred running mean; at the ends over what there is."""
    kernel = np.ones(window)
    total = np.convolve(values, kernel, "same")
    return total / np.convolve(np.ones(len(values)), kernel, "same")


def _draw_loss(axes: Axes, rows: Sequence[Row]) -> None:
    steps, losses = _series(rows, "train", "loss")
    window = max(1, len(losses) // 15) | 1
    if window > 1 and len(losses) >= window:
        axes.plot(steps, losses, color=GREY, linewidth=0.8, alpha=0.7)
        label = f"training, mean of {window}"
        axes.plot(steps, smoothed(losses, window), color=BLUE, linewidth=1.8, label=label)
    else:
        axes.plot(steps, losses, color=BLUE, linewidth=1.8, marker=".", label="training")
    others = dict.fromkeys(row["kind"] for row in rows if row["kind"] != "train")
    for kind in others:
        steps, losses = _series(rows, kind, "loss")
        colour = EVALUATION_COLOURS.get(kind, "black")
        label = {"heldout": "held-out", "general": "general answers"}.get(kind, kind)
        axes.plot(steps, losses, color=colour, marker="o", markersize=4, label=label)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("loss" if any("metrics" in row for row in rows) else "nats per token")
    axes.set_title("Loss", loc="left")
    axes.legend(frameon=False)


def _draw_scores(axes: Axes, rows: Sequence[Row]) -> None:
    scored = [row for row in rows if "metrics" in row]
    for kind in dict.fromkeys(row["kind"] for row in scored):
        of_kind = [row for row in scored if row["kind"] == kind]
        steps = [row["step"] for row in of_kind]
        for metric in of_kind[0]["metrics"]:
            values = [row["metrics"][metric] for row in of_kind]
            axes.plot(steps, values, marker="o", markersize=4, label=f"{kind}: {metric}")
    axes.set_ylabel("score")
    axes.set_title("Scores", loc="left")
    axes.legend(frameon=False)


def _draw_one(
    kind: str, field: str, title: str, unit: str
) -> Callable[[Axes, Sequence[Row]], None]:
    def draw(axes: Axes, rows: Sequence[Row]) -> None:
        steps, values = _series(rows, kind, field)
        axes.plot(steps, values, color=BLUE, linewidth=1.6, marker="." if len(steps) < 3 else "")
        axes.set_ylim(bottom=0)
        axes.set_ylabel(unit)
        axes.set_title(title, loc="left")

    return draw


def _draw_throughput(axes: Axes, rows: Sequence[Row]) -> None:
    steps, values = _series(rows, "train", "tokens_per_second")
    axes.plot(steps, values, color=BLUE, linewidth=1.2)
    if values:
        median = float(np.median(values))
        axes.axhline(median, color=GREY, linestyle="--", linewidth=1, label=f"median {median:.0f}")
        axes.legend(frameon=False)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens per second")
    axes.set_title("Throughput", loc="left")


def _series(rows: Sequence[Row], kind: str, field: str) -> tuple[list[int], list[float]]:
    chosen = [row for row in rows if row["kind"] == kind]
    return [row["step"] for row in chosen], [row[field] for row in chosen]


PLOTS: dict[str, Callable[[Axes, Sequence[Row]], None]] = {
    "loss": _draw_loss,
    "learning_rate": _draw_one("train", "learning_rate", "Learning rate", "learning rate"),
    "grad_norm": _draw_one("train", "grad_norm", "Gradient norm before clipping", "norm"),
    "throughput": _draw_throughput,
}
