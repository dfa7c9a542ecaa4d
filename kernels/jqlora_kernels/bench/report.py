"""What a run of the benchmark leaves: JSON, a table of limits for this device, and a plot."""

import importlib.metadata
import io
import json
import math
import os
import platform
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

FORMAT = 1
PACKAGES = ("jqlora", "jax", "jaxlib", "triton", "jax-triton", "torch", "bitsandbytes", "torchao")
PACKAGES += ("jax-cuda12-plugin", "jax-cuda13-plugin")
COLOURS = ("#2563a8", "#d9731a", "#2e8b57", "#9a4fb0", "#c0392b", "#7a6a53", "#9aa5b1")


def environment() -> dict[str, Any]:
    """The device, the versions, the commit and the date."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    return {
        "format": FORMAT,
        "device": device.device_kind,
        "platform": device.platform,
        "compute_capability": getattr(device, "compute_capability", None),
        "device_memory_bytes": stats.get("bytes_limit"),
        "interpreted": device.platform != "gpu",
        "python": platform.python_version(),
        "versions": {name: v for name in PACKAGES if (v := _version(name)) is not None},
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def tuning_entry(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Limits for ``tuning.json`` from the timings of the forward product, or None without them.

    A kernel keeps the rows up to the largest number at which it wins over its successors, the
    geometric mean over all layers taken, as long as it has won at all smaller ones too; one that
    was not timed gets none.
    """
    triton, mosaic = (means_of(rows, prefix) for prefix in ("triton ", "mosaic"))
    if not triton:
        return None
    vector = _wins_up_to(triton, "vector", ("fused", "decode+gemm"))
    later = {count: found for count, found in triton.items() if count > vector}
    fused = max(vector, _wins_up_to(later, "fused", ("decode+gemm",)))
    hopper = _wins_up_to(mosaic, "", (" decode+gemm",))
    limits = {"vector_rows": vector, "fused_rows": fused, "hopper_rows": hopper}
    return limits | {"measured": True}


def means_of(rows: Sequence[dict[str, Any]], prefix: str) -> dict[int, dict[str, float]]:
    """By rows of ``x`` and by contender (the rest of its name after ``prefix``) the mean logarithm
    of its times for the forward product."""
    times: dict[int, dict[str, list[float]]] = {}
    for row in rows:
        if row["operation"] == "forward" and row["seconds"] and row["contender"].startswith(prefix):
            name = row["contender"].removeprefix(prefix)
            found = times.setdefault(row["rows"], {})
            found.setdefault(name, []).append(math.log(row["seconds"]["median"]))
    return {
        count: {name: float(np.mean(logs)) for name, logs in found.items()}
        for count, found in sorted(times.items())
    }


def _wins_up_to(means: Mapping[int, Mapping[str, float]], name: str, others: Sequence[str]) -> int:
    """The largest number of rows up to which ``name`` is faster than all ``others``, or 0."""
    most = 0
    for count, found in means.items():
        if name not in found or any(found.get(o, math.inf) < found[name] for o in others):
            break
        most = count
    return most


def write_atomically(path: Path, data: bytes) -> None:
    """``data`` under ``path`` wholly, or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def draw(path: Path, content: dict[str, Any]) -> None:
    """Each contender's time over the baseline's, by rows of ``x``; decoding as bandwidths."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in content["rows"] if row["seconds"]]
    names = list(dict.fromkeys(row["contender"] for row in rows))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    figure = Figure(figsize=(12, 4.2), dpi=130, layout="constrained")
    for axes, operation in zip(
        figure.subplots(1, 3), ("decode", "forward", "gradient"), strict=True
    ):
        chosen = [row for row in rows if row["operation"] == operation]
        for name in names:
            own = [row for row in chosen if row["contender"] == name and row["ratio"]]
            if not own:
                continue
            places = [row["rows"] for row in own]
            if operation == "decode":
                layers = list(dict.fromkeys(row["layer"] for row in chosen))
                places = [layers.index(row["layer"]) for row in own]
                axes.set_xticks(range(len(layers)), layers, rotation=60, ha="right", fontsize=7)
            else:
                axes.set_xscale("log", base=2)
                axes.set_xlabel("rows of x")
            ratios = [row["ratio"] for row in own]
            axes.plot(places, ratios, "o", ms=3, label=name, color=colours[name])
        axes.set_yscale("log")
        axes.set_ylabel("time over that of a copy" if operation == "decode" else "time over bf16's")
        axes.set_title(operation)
        axes.grid(alpha=0.3, linewidth=0.6)
        if chosen:
            axes.legend(fontsize=7)
    note = " (emulated: not a measurement)" if content["interpreted"] else ""
    figure.suptitle(f"{content['device']}{note}")
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git says of the checkout that this file lies in, or None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
