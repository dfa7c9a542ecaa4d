"""One line for each measurement, with what it was measured on."""

import json
import os
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jqlora import processor


def record(file: Path, row: Mapping[str, Any], *packages: str) -> None:
    """Append ``row`` to ``file`` as one line of JSON: with the processor, its cores and how many
    processes asked for them (the load average of a minute), the versions of jax and of
    ``packages``, and the date."""
    circumstances = {
        "processor": processor.name(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "versions": {package: version(package) for package in ("jax", *packages)},
        "date": time.strftime("%Y-%m-%d"),
    }
    with file.open("a") as results:
        results.write(json.dumps({**row, **circumstances}) + "\n")
