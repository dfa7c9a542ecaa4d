"""Times every kernel on this machine's GPU beside its baseline, in one run, as ratios.

  decode     both levels of scales to bf16; baseline: a device-to-device copy of as many bytes
  forward    y = x W^T for 1 ... 16384 rows of x; baseline: the backend's own bf16 GEMM (cuBLAS)
  gradient   dx = g W, likewise

bitsandbytes and torchao join where they are installed. Written are DIR/DEVICE.json (device,
versions, commit, every timing with its spread, every refusal with its reason), DIR/DEVICE.png, and
with --write-tuning the limits between the kernels, into the package's tuning.json. A result that
differs from the definition's by more than rounding is reported as wrong, and never as fast.

  python -m jqlora_kernels.bench --quick      three layers, seven numbers of rows: some minutes
  python -m jqlora_kernels.bench              all layers and rows: some hours; --only takes a part
  python -m jqlora_kernels.bench --tiny       one tiny layer, emulated where there is no GPU, to see
                                              that everything runs; its times mean nothing there
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# So that torch, in the same process, finds memory left.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np

from jqlora_kernels import tuning
from jqlora_kernels.bench import cases, peers, report, timing
from jqlora_kernels.bench.cases import Case
from jqlora_kernels.shapes import MODEL_LAYERS, ROWS

QUICK_LAYERS = ("llama3-8b q/o", "llama3-8b up", "llama-65b q/o")
QUICK_ROWS = (1, 4, 16, 64, 512, 2048, 8192)
BUDGET = 2**-6
"""Of a product's largest value, between two orders of summation and two roundings to bf16."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        "python -m jqlora_kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="fewer layers and rows")
    size.add_argument("--tiny", action="store_true", help="one tiny layer; runs on a CPU too")
    parser.add_argument("--out", type=Path, default=Path("bench"), metavar="DIR")
    parser.add_argument("--rounds", type=int, default=7, help="of all contenders in turn")
    parser.add_argument("--only", metavar="REGEX", help="cases whose description matches")
    parser.add_argument("--write-tuning", action="store_true", help="into the package's table")
    chosen = parser.parse_args(arguments)
    interpret = jax.default_backend() != "gpu"
    if interpret and not chosen.tiny:
        parser.error("JAX sees no GPU here; --tiny emulates one to try everything out")
    if interpret and chosen.write_tuning:
        parser.error("--write-tuning needs a GPU: emulated kernels' times mean nothing")
    listed = [c for c in case_list(chosen) if not chosen.only or re.search(chosen.only, str(c))]
    if not listed:
        parser.error(f"--only {chosen.only}: no case matches")

    content = report.environment() | {"rounds": chosen.rounds, "arguments": sys.argv[1:]}
    rows: list[dict[str, Any]] = []
    start = time.monotonic()
    for done, case in enumerate(listed, 1):
        rows += measure(case, chosen.rounds, interpret)
        left = (time.monotonic() - start) / done * (len(listed) - done)
        print(f"[{done}/{len(listed)}] {case}: {summary(rows, case)} · {clock(left)} left")
    content |= {"rows": rows, "tuning": None if interpret else report.tuning_entry(rows)}

    stem = chosen.out / re.sub(r"\W+", "-", content["device"].lower()).strip("-")
    report.write_json(stem.with_suffix(".json"), content)
    report.draw(stem.with_suffix(".png"), content)
    print(f"wrote {stem}.json and {stem}.png")
    if content["tuning"]:
        print(f"limits between the kernels on this device: {content['tuning']}")
    if chosen.write_tuning and content["tuning"]:
        table = json.loads(tuning.FILE.read_text()) | {content["device"]: content["tuning"]}
        report.write_json(tuning.FILE, table)
        print(f"wrote {tuning.FILE}")
    wrong = [row for row in rows if row["wrong"]]
    for row in wrong:
        print(f"WRONG: {row['contender']} in {row['case']}, off by {row['error']}")
    return 1 if wrong else 0


def case_list(chosen: argparse.Namespace) -> list[Case]:
    """What to measure, the small before the large."""
    layers = {name: MODEL_LAYERS[name] for name in QUICK_LAYERS} if chosen.quick else MODEL_LAYERS
    counts = QUICK_ROWS if chosen.quick else ROWS
    if chosen.tiny:
        layers, counts = {"tiny": (128, 128)}, (2,)
    found = []
    for name, (inputs, outputs) in layers.items():
        found += [Case("decode", name, inputs, outputs, 0, nested) for nested in (True, False)]
        for operation in ("forward", "gradient"):
            found += [Case(operation, name, inputs, outputs, count) for count in counts]
    return sorted(found, key=lambda case: (case.moved_bytes, case.operations))


def measure(case: Case, rounds: int, interpret: bool) -> list[dict[str, Any]]:
    """One row for each contender, with its timing or with the reason why there is none."""
    calls, results = cases.contenders(case, interpret)
    (baseline, *_) = calls
    expected = np.asarray(results["reference"](), np.float32)
    ready, rows = [], {}
    for name, build in (calls | peers.contenders(case)).items():
        row = {"case": str(case), "operation": case.operation, "layer": case.layer}
        row |= {"K": case.inputs, "N": case.outputs, "rows": case.rows, "contender": name}
        row |= {"double_quant": case.double_quant, "refused": None, "failed": None}
        rows[name] = row | {"error": None, "wrong": False, "seconds": None, "ratio": None}
        try:
            if name in results:
                rows[name] |= compare(results[name](), expected, exact=case.operation == "decode")
            if not rows[name]["wrong"]:
                ready.append(build())
        except NotImplementedError as refusal:
            rows[name]["refused"] = str(refusal)
        except Exception as error:
            # A contender that does not compile, or finds no memory, must not end the others' run.
            rows[name]["failed"] = f"{type(error).__name__}: {str(error)[:500]}"
    times = timing.race(ready, rounds)
    for name, found in times.items():
        rows[name]["seconds"] = vars(found)
        rows[name]["ratio"] = found.median / times[baseline].median if baseline in times else None
        rows[name]["bytes_a_second"] = case.moved_bytes / found.median
    return list(rows.values())


def compare(actual: jax.Array, expected: np.ndarray, exact: bool) -> dict[str, Any]:
    """The largest difference over the largest value, and whether that is more than rounding."""
    difference = np.abs(np.asarray(actual, np.float32).reshape(expected.shape) - expected).max()
    error = float(difference / np.abs(expected).max())
    return {"error": error, "wrong": not error <= (0 if exact else BUDGET)}


def summary(rows: Sequence[dict[str, Any]], case: Case) -> str:
    """The contenders of one case, fastest first, in microseconds."""
    own = [row for row in rows if row["case"] == str(case) and row["seconds"]]
    own.sort(key=lambda row: row["seconds"]["median"])
    return ", ".join(f"{row['contender']} {1e6 * row['seconds']['median']:.1f} µs" for row in own)


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


if __name__ == "__main__":
    sys.exit(main())
