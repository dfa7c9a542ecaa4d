"""How long does it take to convert a large checkpoint, and how much memory?

    python experiments/05_certificates/convert.py                # a checkpoint of 2.3 GB, minutes
    python experiments/05_certificates/convert.py --layers 40    # a larger one

A random Llama-shaped checkpoint in bf16 is written on the spot, in shards. Each conversion runs
in a process of its own, and its peak is the kernel's (VmHWM), compiler and interpreter included:
loading it, loading it into 4 bits with double quantization, and loading and saving it again.
Prediction: the peak lies about one tensor and the interpreter above what is kept. One line a
conversion goes to ``conversion.jsonl``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jqlora.run.record import record

HERE = Path(__file__).parent
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
PROGRAM = """
import re, sys, time
begin = time.perf_counter()
import jqlora as jq
from jqlora.quant import NF4, footprint
spec = NF4(double_quant=True) if sys.argv[2] == "load in 4 bits" else None
model, params = jq.load(sys.argv[1], quantize=spec)
kept = footprint(params).bytes
if sys.argv[2] == "load and save":
    jq.save_pretrained(sys.argv[1] + "-again", model, params)
text = open("/proc/self/status").read()
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", text)[1]) * 1024
print(time.perf_counter() - begin, peak, kept)
"""


def write(folder: Path, layers: int) -> int:
    """A shard a layer; returns the bytes of all weights. Values repeat, which no step here sees."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    size, wide, words = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    noise = np.random.default_rng(0).standard_normal(words * size, np.float32)
    values = (noise / np.float32(size**0.5)).astype(ml_dtypes.bfloat16)
    square = {f"self_attn.{n}_proj": (size, size) for n in "qkvo"}
    shapes = square | {f"mlp.{n}_proj": (wide, size) for n in ("gate", "up")}
    shapes["mlp.down_proj"] = (size, wide)
    ends = {"model.embed_tokens.weight": (words, size), "lm_head.weight": (words, size)}
    shards = [ends | {"model.norm.weight": (size,)}]
    for i in range(layers):
        norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (size,))
        names = (shapes | norms).items()
        shards.append({f"model.layers.{i}.{name}.weight": shape for name, shape in names})
    index, total = {}, 0
    for number, shard in enumerate(shards):
        file = f"model-{number:05}.safetensors"
        arrays = {n: values[: int(np.prod(shape))].reshape(shape) for n, shape in shard.items()}
        save_file(arrays, folder / file)
        index |= dict.fromkeys(shard, file)
        total += sum(array.nbytes for array in arrays.values())
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "large"
        total = write(folder, arguments.layers)
        for what in ("load", "load in 4 bits", "load and save"):
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, str(folder), what],
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise SystemExit(f"{what} failed:\n{done.stderr}")
            seconds, peak, kept = map(float, done.stdout.split())
            row = {
                "what": what,
                "checkpoint_bytes": total,
                "seconds": seconds,
                "peak_bytes": int(peak),
                "kept_bytes": int(kept),
                "peak_to_checkpoint": peak / total,
            }
            print(
                f"{what:15} {seconds:6.1f} s, peak {peak / 2**30:.2f} GiB = "
                f"{peak / total:.2f} of the checkpoint's {total / 2**30:.2f} GiB; kept "
                f"{kept / 2**30:.2f} GiB",
                flush=True,
            )
            record(HERE / "conversion.jsonl", row)


if __name__ == "__main__":
    main()
