"""How much sooner is a model loaded into 4 bits the second time, and what memory does it take?

    python experiments/07_loading/run.py                # a checkpoint of 2.3 GB, some three minutes
    python experiments/07_loading/run.py --layers 40    # a larger one

A random Llama-shaped checkpoint in bf16 is written on the spot, in shards. Each start is a process
of its own that loads it into NF4 with double quantization: without a cache, with an empty one
(the first start), and with what that left (the second). "on disk" starts with the files dropped
from the page cache, "in memory" with the files in it. Seconds are those of ``jq.load`` with what it
imports and compiles; programs are kept too, as the commands keep them.

Memory is measured on a second load in one process, which does not compile: the peak of the resident
set above what is kept must not exceed the largest tensor and 64 MiB. That is asserted.

Prediction: the second start reads 0.34 of the bytes and quantizes nothing: three times as fast.
One line goes to ``results.jsonl``.
"""

import argparse
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from jqlora.run.record import record

HERE = Path(__file__).parent
write = runpy.run_path(str(HERE.parent / "05_certificates" / "convert.py"))["write"]
LARGEST = 32000 * 2048 * 2  # bytes of the embedding
OVERHEAD = 64 * 2**20  # what the allocator keeps, and the temporaries of quantizing one matrix
START = """
import pathlib, sys, time
import jax, jqlora as jq
begin = time.perf_counter()
cache = jq.Cache(pathlib.Path(sys.argv[2])) if sys.argv[2] != "none" else None
model, params = jq.load(sys.argv[1], quantize=jq.NF4(double_quant=True), cache=cache)
jax.block_until_ready(params)
print(time.perf_counter() - begin)
"""
MEMORY = """
import ctypes, gc, pathlib, re, sys
import jqlora as jq

def status(field):
    text = open("/proc/self/status").read()
    return int(re.search(field + r":\\\\s+(\\\\d+) kB", text)[1]) * 1024

cache = jq.Cache(pathlib.Path(sys.argv[2])) if sys.argv[2] != "none" else None
for measured in (False, True):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again from here
    model, params = jq.load(sys.argv[1], quantize=jq.NF4(double_quant=True), cache=cache)
    peak, kept = status("VmHWM") - before, jq.footprint(params).bytes
    del model, params
print(peak, kept)
""".replace("\\\\", "\\")


def forget(folder: Path) -> None:
    """Drop the files from the page cache, so that they are read from the disk."""
    for file in folder.rglob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def run(program: str, model: Path, cache: Path | None, programs: Path | None) -> list[float]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    if programs is not None:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(programs)
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    done = subprocess.run(
        [sys.executable, "-c", program, str(model), str(cache or "none")],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return [float(word) for word in done.stdout.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3, help="0 measures memory alone")
    arguments = parser.parse_args()
    seconds: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        total = write(model, arguments.layers)
        for where in ("in memory", "on disk") if arguments.rounds else ():
            taken: dict[str, list[float]] = {"no cache": [], "first": [], "second": []}
            for i in range(arguments.rounds):
                cache, programs = (
                    Path(place) / f"{where}-{i}",
                    Path(place) / f"programs-{where}-{i}",
                )
                for start in taken:
                    if where == "on disk":
                        forget(Path(place))
                    kept = (None, None) if start == "no cache" else (cache, programs)
                    taken[start] += run(START, model, *kept)
            seconds[where] = {start: statistics.median(values) for start, values in taken.items()}
            ratio = seconds[where]["no cache"] / seconds[where]["second"]
            seconds[where]["no cache / second"] = ratio
            print(where, {name: round(value, 2) for name, value in seconds[where].items()})
        above = {}
        for name, kept in (("no cache", None), ("second", Path(place) / "kept")):
            peak, result = run(MEMORY, model, kept, None)
            above[name] = int(peak - result)
            print(
                f"{name}: kept {result / 2**20:.0f} MiB, peak {above[name] / 2**20:.0f} MiB above"
            )
    row = {
        "checkpoint_bytes": total,
        "kept_bytes": int(result),
        "largest_tensor_bytes": LARGEST,
        "peak_above_kept_bytes": above,
        "load_seconds": seconds,
        "rounds": arguments.rounds,
    }
    record(HERE / "results.jsonl", row)
    assert max(above.values()) <= LARGEST + OVERHEAD, above


if __name__ == "__main__":
    main()
