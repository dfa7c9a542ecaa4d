"""A certificate as files: ``certificate.json``, and ``certificate.html`` that stands alone."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jqlora.compare.certificate import Certificate
from jqlora.compare.measure import Measurement
from jqlora.io.atomic import atomic_write_json, atomic_write_text
from jqlora.train.pages import embedded, render
from jqlora.train.plots import BLUE, GREEN, GREY, ORANGE, save_figure, tidy
from jqlora.train.usage import readable_bytes

TINY = 1e-12
"""What is drawn on a logarithmic axis where nothing differs."""
TITLES = {
    "hidden states": "Hidden states, layer by layer",
    "logits": "Logits",
    "loss": "Loss",
    "gradients": "Gradients of the adapter, last layer first",
    "gradients together": "Gradients together",
    "loss curve": "Losses while training",
    "adapters": "Adapter after training",
    "files": "Files",
}


def write_certificate(folder: str | os.PathLike, certificate: Certificate) -> Path:
    """Write JSON, plots and page into ``folder``; returns the page's path."""
    place = Path(folder)
    images = {
        "layers": save_figure(_draw_layers(certificate), place / "layers.png"),
        "losses": save_figure(_draw_losses(certificate), place / "losses.png"),
    }
    content = certificate.to_json()
    atomic_write_json(place / "certificate.json", content)
    page = render(
        "jqlora.compare",
        "certificate.html.jinja",
        certificate=certificate,
        summary=summary(certificate),
        tables={title: _of(certificate, name) for name, title in TITLES.items()},
        facts=facts(certificate.facts),
        measure=certificate.facts["budgets"]["measure"],
        plots=embedded(images),
        content=json.dumps(content, indent=2, ensure_ascii=False),
    )
    atomic_write_text(place / "certificate.html", page)
    return place / "certificate.html"


def summary(certificate: Certificate) -> list[tuple[str, int, Measurement]]:
    """For every quantity its title, the number of measurements and the worst of them."""
    made = []
    for quantity, title in TITLES.items():
        worst = certificate.worst(quantity)
        if worst is not None:
            made.append((title.partition(",")[0], len(_of(certificate, quantity)), worst))
    return made


def facts(found: dict[str, Any]) -> dict[str, str]:
    """What was compared, in words."""
    inputs, training = found["inputs"], found["training"]
    return {
        "model": f"{found['model']} ({found['model_type']}, {found['task']})",
        "adapter": f"{found['adapter']}; {found['trainable_parameters']:,} parameters",
        "base": found["quantized"] or "not quantized by this comparison",
        "computed in": found["dtype"],
        "inputs": (
            f"{inputs['origin']}: {inputs['batches']} batches of {inputs['rows']} x "
            f"{inputs['length']}, {inputs['tokens']} tokens without padding"
        ),
        "training": (
            f"{training['steps']} steps of AdamW, learning rate {training['learning_rate']:g}, "
            f"betas {training['betas'][0]} and {training['betas'][1]}, decay "
            f"{training['weight_decay']:g}, no clipping"
        ),
        "seconds": ", ".join(f"{side} {time:.0f}" for side, time in found["seconds"].items()),
        "peak memory": readable_bytes(found["peak_host_bytes"]),
        "versions": ", ".join(f"{k} {v}" for k, v in found["versions"].items()),
        "date": found["date"],
    }


def _of(certificate: Certificate, quantity: str) -> list[Measurement]:
    return [one for one in certificate.measurements if one.quantity == quantity]


def _draw_layers(certificate: Certificate) -> Figure:
    figure = Figure(figsize=(7.2, 3.6), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    states = _of(certificate, "hidden states")
    axes.plot([max(one.error, TINY) for one in states], color=BLUE, marker="o", markersize=3)
    axes.axhline(states[0].budget, color=ORANGE, linestyle="--", linewidth=1.2, label="budget")
    axes.set_yscale("log")
    axes.set_xlabel("after layer (0: embeddings)")
    axes.set_ylabel("error")
    axes.set_title("Hidden states", loc="left")
    axes.legend(frameon=False)
    tidy(axes)
    return figure


def _draw_losses(certificate: Certificate) -> Figure:
    figure = Figure(figsize=(7.2, 5.4), dpi=130, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    curves = certificate.curves
    steps = np.arange(1, len(curves["ours"]) + 1)
    for name in sorted(curves, reverse=True):  # the exact ones, theirs, ours on top
        colour, width = {"theirs": (GREY, 4.0), "ours": (BLUE, 1.6)}.get(name, (GREEN, 7.0))
        above.plot(steps, curves[name], color=colour, linewidth=width, label=name)
    above.set_ylabel("loss")
    above.set_title("Losses while training", loc="left")
    above.legend(frameon=False)
    _draw_gaps(below, steps, curves)
    for axes in (above, below):
        tidy(axes)
    return figure


def _draw_gaps(axes: Axes, steps: np.ndarray, curves: dict[str, list[float]]) -> None:
    """Each side's distance from what it is held to."""
    held_to = max(curves)  # "theirs in ..." where there is such a run, else "theirs"
    reference = np.asarray(curves[held_to])
    for name, colour in {"ours": BLUE, "theirs": GREY}.items():
        if name == held_to:
            continue
        gap = np.abs(np.asarray(curves[name]) - reference) / np.abs(reference)
        axes.plot(steps, np.maximum(gap, TINY), color=colour, linewidth=1.2, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("relative difference")
    axes.legend(frameon=False)
