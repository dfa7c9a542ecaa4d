"""AdaLoRA's pictures: the ranks that every module ended with, the way there, and what decided."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jqlora.methods.targeting import layer_number
from jqlora.train.metrics import Row
from jqlora.train.plots import BLUE, GREY, ORANGE, save_figure, tidy

RANK_PLOTS = ("ranks", "budget", "importance")


def draw_rank_plots(
    record: dict[str, Any], rows: Sequence[Row], directory: str | Path
) -> dict[str, Path]:
    """Write ``ranks``, ``budget`` and ``importance``; returns their paths."""
    table, kinds, layers = rank_table(record)
    size = (1.8 + 0.32 * len(layers), 1.5 + 0.34 * len(kinds))
    ranks = Figure(figsize=(max(size[0], 5.0), size[1]), dpi=130, layout="constrained")
    _draw_ranks(ranks, table, kinds, layers, int(record["init_rank"]))
    paths = {"ranks": save_figure(ranks, Path(directory) / "ranks.png")}
    for name, draw in (
        ("budget", functools.partial(_draw_budget, rows=rows)),
        ("importance", functools.partial(_draw_importance, record=record)),
    ):
        figure = Figure(figsize=(7.2, 3.6), dpi=130, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        tidy(axes)
        paths[name] = save_figure(figure, Path(directory) / f"{name}.png")
    return paths


def rank_table(record: dict[str, Any]) -> tuple[np.ndarray, list[str], list[str]]:
    """Final ranks ``[kinds of module, layers]``, NaN where a layer has no such module, with the
    labels of both axes; modules outside the layers are in a column of their own."""
    places = {}
    for name, module in record["modules"].items():
        number = layer_number(name)
        kind = name.rsplit(".", 1)[-1] if number is None else name.split(f".{number}.", 1)[-1]
        places[kind, number] = sum(module["kept"])
    kinds = list(dict.fromkeys(kind for kind, _ in places))
    numbers = sorted({number for _, number in places}, key=lambda n: -1 if n is None else n)
    table = np.full((len(kinds), len(numbers)), np.nan)
    for (kind, number), rank in places.items():
        table[kinds.index(kind), numbers.index(number)] = rank
    return table, kinds, ["-" if number is None else str(number) for number in numbers]


def _draw_ranks(
    figure: Figure, table: np.ndarray, kinds: list[str], layers: list[str], most: int
) -> None:
    axes = figure.add_subplot()
    image = axes.imshow(table, cmap="Blues", vmin=0, vmax=most, aspect="auto")
    axes.set_xticks(range(len(layers)), layers, fontsize=8)
    axes.set_yticks(range(len(kinds)), kinds, fontsize=9)
    axes.set_xlabel("layer")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    for (row, column), rank in np.ndenumerate(table):
        if not np.isnan(rank):
            colour = "white" if rank > 0.6 * most else "black"
            axes.text(
                column, row, f"{rank:.0f}", ha="center", va="center", fontsize=8, color=colour
            )
    axes.set_title(f"Final ranks (of {most} at the start)", loc="left")
    ticks = MaxNLocator(integer=True)
    figure.colorbar(image, ax=axes, fraction=0.04, pad=0.01, ticks=ticks, label="rank")


def _draw_budget(axes: Axes, rows: Sequence[Row]) -> None:
    chosen = [row for row in rows if row["kind"] == "train"]
    steps = [row["step"] for row in chosen]
    axes.plot(
        steps,
        [row["rank"] for row in chosen],
        color=GREY,
        linewidth=0.8,
        marker=".",
        markersize=3,
        label="triplets whose λ is not zero",
    )
    axes.plot(steps, [row["budget"] for row in chosen], color=BLUE, linewidth=1.8, label="budget")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("triplets in all modules")
    axes.set_title("Rank and budget", loc="left")
    axes.legend(frameon=False)


def _draw_importance(axes: Axes, record: dict[str, Any]) -> None:
    modules = record["modules"].values()
    scores = np.asarray([score for module in modules for score in module["scores"]])
    kept = np.asarray([flag for module in modules for flag in module["kept"]])
    order = np.argsort(-scores, kind="stable")
    place = np.arange(1, len(order) + 1)
    for flag, colour, label in ((True, BLUE, "kept"), (False, ORANGE, "pruned")):
        shown = (kept[order] == flag) & (scores[order] > 0)
        axes.scatter(place[shown], scores[order][shown], s=5, color=colour, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("triplets of all modules, best first")
    axes.set_ylabel("score")
    axes.set_title("Importance of the triplets at the end", loc="left")
    axes.legend(frameon=False)
