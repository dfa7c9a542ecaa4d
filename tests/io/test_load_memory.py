"""Loading needs about one tensor of host memory above its result.

Measured in a process of its own, which loads the same checkpoint twice: the first load compiles
(about 150 MB of compiler, whatever the size of the model), the second one is measured.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SHAPE = {
    "vocab_size": 8000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
LARGEST = 8000 * 1024 * 4
# What the allocator has not given back, and the temporaries of quantizing one matrix.
OVERHEAD = 64 * 2**20
PROGRAM = """
import ctypes, gc, json, re, sys
from jqlora.io import load
from jqlora.quant import NF4, footprint

def status(field):
    text = open("/proc/self/status").read()
    return int(re.search(field + r":\\s+(\\d+) kB", text)[1]) * 1024

spec = NF4(double_quant=True) if sys.argv[2] == "nf4" else None
for measured in (False, True):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again from here
    model, params = load(sys.argv[1], quantize=spec, dtype=sys.argv[3])
    peak, result = status("VmHWM") - before, footprint(params).bytes
    del model, params
print(json.dumps({"peak": peak, "result": result}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from tests.io.toy_files import write_checkpoint

    folder = tmp_path_factory.mktemp("large")
    tensors = write_checkpoint(folder, max_shard_bytes=50_000_000, **SHAPE)
    return folder, sum(array.nbytes for array in tensors.values())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("scheme", "dtype"), [("none", "float32"), ("nf4", "bfloat16")])
def test_the_peak_lies_about_one_tensor_above_the_result(checkpoint, scheme, dtype):
    folder, size = checkpoint
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), scheme, dtype],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    above = measured["peak"] - measured["result"]
    print(f"{scheme} {dtype}: result {measured['result']:,}, peak above it {above:,} of {size:,}")
    assert above <= LARGEST + OVERHEAD
    assert size / 2 > LARGEST + OVERHEAD, "the bound must be far from holding everything"
