"""How does the cost of a QLoRA step grow with depth, width, sequence, batch, rank and adapters?

    python experiments/11_scaling/run.py                # six minutes on two cores

A small random Llama in NF4 with double quantization (width 256, 4 layers, 4 x 128 tokens, rank 16,
all linear layers), of which one size at a time is raised; "adapters" are trained by one step on one
base, as ``jqlora sweep`` does. The sizes of an axis take turns step by step; a time is the least of
its rounds. Fitted over each axis's last three sizes is the exponent e of time ~ size^e. Prediction:
1 for depth and batch; between 1 and 2 for width and sequence, where square terms are part of the
work; nearly 0 for rank; a little below 1 for adapters, which on a CPU share nothing but the
decoding. One line goes to ``results.jsonl``, and ``scaling.png`` shows the last one.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jqlora as jq
from jqlora.models import LlamaConfig, LlamaForCausalLM
from jqlora.run.record import record
from jqlora.train.together import Together, make_joint_step

HERE = Path(__file__).parent
BASE = {"depth": 4, "width": 256, "sequence": 128, "batch": 4, "rank": 16, "adapters": 1}
AXES = {
    "depth": (4, 8, 16),
    "width": (256, 512, 1024),
    "sequence": (128, 256, 512, 1024),
    "batch": (2, 4, 8, 16),
    "rank": (16, 64, 256),
    "adapters": (1, 2, 4, 8),
}


def one_step(sizes: dict[str, int]):
    """A function that makes one training step, compiled, and waits for it."""
    width = sizes["width"]
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=sizes["depth"],
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        head_dim=64,
    )
    model = LlamaForCausalLM(config, dtype=jnp.float32, remat="dots")
    inputs = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), model.example_inputs())
    dense = jax.jit(lambda key: model.init(key, **inputs)["params"])(jax.random.key(0))
    params = jq.quantize_params(dense, jq.NF4(double_quant=True))
    plan = jq.plan(model, params, jq.LoRA(rank=sizes["rank"], targets="all-linear"))
    tx = jq.optim.adamw(1e-4, max_grad_norm=1.0)
    count = sizes["adapters"]
    states = [
        jq.TrainState.create(jq.init(jax.random.key(i), plan), tx, jax.random.key(i))
        for i in range(count)
    ]
    ids = np.zeros((sizes["batch"], sizes["sequence"]), np.int32)
    ones, positions = np.ones_like(ids), ids + np.arange(sizes["sequence"], dtype=np.int32)
    batch = {"input_ids": ids, "positions": positions, "segment_ids": ones, "loss_mask": ones}
    apply = jq.bind(model, plan)
    state: Any = states[0] if count == 1 else Together(tuple(states))
    step: Any = (
        jq.make_train_step(apply, tx)
        if count == 1
        else make_joint_step([apply] * count, [tx] * count)
    )

    def turn() -> None:
        nonlocal state
        state, metrics = step(state, params, batch)
        jax.block_until_ready(metrics)

    turn()
    return turn


def times_of(axis: str, rounds: int) -> list[float]:
    """The least seconds of a step at each size of ``axis``."""
    steps = [one_step({**BASE, axis: size}) for size in AXES[axis]]
    taken: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for step, seconds in zip(steps, taken, strict=True):
            begin = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begin)
    return [min(seconds) for seconds in taken]


def exponent(sizes: tuple[int, ...], seconds: list[float]) -> float:
    """The slope of log time over log size, over the last three sizes."""
    return float(np.polyfit(np.log(sizes[-3:]), np.log(seconds[-3:]), 1)[0])


def draw(found: dict[str, dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, plots = pyplot.subplots(
        1, len(found), figsize=(13, 3), layout="constrained", squeeze=False, sharey=True
    )
    for axes, (axis, result) in zip(plots[0], found.items(), strict=True):
        axes.loglog(result["sizes"], result["seconds"], "o-", color="#4477aa")
        axes.set_title(f"{axis}: exponent {result['exponent']:.2f}", fontsize=10)
        axes.set_xticks(result["sizes"], result["sizes"])
        axes.minorticks_off()
        axes.set_xlabel(axis)
    plots[0, 0].set_yticks((0.1, 0.3, 1, 3), ("0.1", "0.3", "1", "3"))
    plots[0, 0].set_ylabel("seconds a step")
    figure.savefig(HERE / "scaling.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--axes", nargs="+", default=[*AXES], choices=AXES)
    arguments = parser.parse_args()
    found = {}
    for axis in arguments.axes:
        seconds = times_of(axis, arguments.rounds)
        e = exponent(AXES[axis], seconds)
        found[axis] = {"sizes": AXES[axis], "seconds": seconds, "exponent": e}
        print(f"{axis:9} exponent {e:.2f}  {[round(s, 4) for s in seconds]}", flush=True)
        jax.clear_caches()
    row = {
        "base": BASE,
        "axes": found,
        "rounds": arguments.rounds,
        "device": jax.devices()[0].device_kind,
    }
    record(HERE / "results.jsonl", row)
    draw(found)


if __name__ == "__main__":
    main()
