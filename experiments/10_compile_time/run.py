"""Does the time to compile a step depend on the depth of the model?

    python experiments/10_compile_time/run.py       # a minute or two

The same small Llama with 8 and with 80 layers, scanned, and 8 unrolled for comparison, take turns
in one process; every turn traces, lowers and compiles afresh. Prediction: 80 layers take as long as
8, at most 1.2 times; a loop over 8 layers several times as long. That the ratio stays below 1.2 is
asserted. One line goes to ``results.jsonl``.
"""

import argparse
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import jqlora as jq
from jqlora.models import LlamaConfig, LlamaForCausalLM
from jqlora.run.record import record

HERE = Path(__file__).parent
MODELS = {"8 layers": (8, True), "80 layers": (80, True), "8 layers, unrolled": (8, False)}


def seconds_to_compile(depth: int, scan: bool) -> float:
    """Of the training step of a model of which only shapes exist."""
    jax.clear_caches()
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=depth,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
    )
    model = LlamaForCausalLM(config, dtype=jnp.float32, remat="dots", scan=scan)
    params = jq.abstract_params(model, jq.NF4(double_quant=True))
    plan = jq.plan(model, params, jq.LoRA(rank=16, targets="all-linear"))
    tx = jq.optim.adamw(1e-4, max_grad_norm=1.0)
    key = jax.eval_shape(lambda: jax.random.key(0))
    adapters = jax.eval_shape(lambda key: jq.init(key, plan), key)
    state = jax.eval_shape(lambda a, k: jq.TrainState.create(a, tx, k), adapters, key)
    ids = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    batch = dict.fromkeys(("input_ids", "positions", "segment_ids", "loss_mask"), ids)
    step = jq.make_train_step(jq.bind(model, plan), tx)
    begin = time.perf_counter()
    step.lower(state, params, batch).compile()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    seconds_to_compile(1, True)  # what is imported or set up at the first time
    taken: dict[str, list[float]] = {name: [] for name in MODELS}
    for _ in range(arguments.rounds):
        for name, (depth, scan) in MODELS.items():
            taken[name].append(seconds_to_compile(depth, scan))
    median = {name: statistics.median(seconds) for name, seconds in taken.items()}
    ratio = median["80 layers"] / median["8 layers"]
    for name, seconds in taken.items():
        print(f"{name:19} {median[name]:.2f} s  {[round(s, 2) for s in seconds]}")
    print(f"80 layers ÷ 8 layers = {ratio:.3f}")
    row = {
        "seconds": taken,
        "ratio": ratio,
    }
    record(HERE / "results.jsonl", row)
    assert ratio <= 1.2, ratio


if __name__ == "__main__":
    main()
