"""What does a training step cost by how the base is stored, and beside full fine-tuning?

    python experiments/09_storage_step_time/run.py      # two minutes on two cores
    python experiments/09_storage_step_time/run.py --dtype bfloat16 --layers 16 --width 2048

One random Llama, held whole, in NF4, in NF4 with double quantization and in INT8, with LoRA on all
linear layers; and full fine-tuning by the same step. All in one process, taking turns step by step,
so that what else the machine does falls on all alike. Reported is the median over rounds of each
step's time divided by that of LoRA on the whole base in the same round: the tax of 4 bits.
Prediction for two CPU cores, where a layer's decoding is not hidden behind its products: 1.1 to
1.3; full fine-tuning 1.5, for it computes the weights' gradients too. One line goes to
``results.jsonl``, and ``tax.png`` shows the last one. The second command is of a size for a GPU.
"""

import argparse
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jqlora as jq
from jqlora.models import LlamaConfig, LlamaForCausalLM
from jqlora.run.record import record

HERE = Path(__file__).parent
BASES = {
    "LoRA, whole base": None,
    "QLoRA, NF4": jq.NF4(),
    "QLoRA, NF4 + double quant": jq.NF4(double_quant=True),
    "QLoRA, INT8": jq.INT8(),
}
WHOLE, FULL = "LoRA, whole base", "full fine-tuning"


def model_of(arguments: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.width,
        intermediate_size=3 * arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.width // 64,
        num_key_value_heads=arguments.width // 64,
        head_dim=64,
        dtype=arguments.dtype,
    )
    return LlamaForCausalLM(config, dtype=jnp.dtype(arguments.dtype), remat="dots")


def batch_of(arguments: argparse.Namespace) -> dict[str, np.ndarray]:
    rows, length = arguments.shape
    ids = np.random.default_rng(0).integers(0, arguments.vocabulary, (rows, length), np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
    ones = np.ones_like(ids)
    return {"input_ids": ids, "positions": positions, "segment_ids": ones, "loss_mask": ones}


def contestants(arguments: argparse.Namespace):
    """For each name a function that makes one step and returns its loss."""
    model = model_of(arguments)
    inputs = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), model.example_inputs())
    dense = jax.jit(lambda key: model.init(key, **inputs)["params"])(jax.random.key(0))
    batch, tx = batch_of(arguments), jq.optim.adamw(1e-4, max_grad_norm=1.0)
    spec = jq.LoRA(rank=arguments.rank, alpha=2 * arguments.rank, targets="all-linear")

    def turns(step, state, params):
        def one() -> float:
            nonlocal state
            state, metrics = step(state, params, batch)
            return float(metrics["loss"])

        return one

    for name, storage in BASES.items():
        params = dense if storage is None else jq.quantize_params(dense, storage)
        plan = jq.plan(model, params, spec)
        adapters = jq.init(jax.random.key(1), plan)
        state = jq.TrainState.create(adapters, tx, jax.random.key(2))
        yield name, turns(jq.make_train_step(jq.bind(model, plan), tx), state, params)
    # what is trained may hold all parameters: then none are frozen
    state = jq.TrainState.create({"params": dense}, tx, jax.random.key(2))
    yield FULL, turns(jq.make_train_step(jq.bind(model), tx), state, {})


def draw(ratios: dict[str, list[float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 2.8), layout="constrained")
    for row, (name, values) in enumerate(ratios.items()):
        axes.barh(row, statistics.median(values), color="#4477aa" if name != FULL else "#ccbb44")
        axes.plot(values, [row] * len(values), "k|", markersize=9)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(ratios)), list(ratios))
    axes.set_xlabel("step time ÷ LoRA on the whole base (bars: medians; marks: rounds)")
    axes.invert_yaxis()
    figure.savefig(HERE / "tax.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--shape", type=int, nargs=2, default=(4, 128), metavar=("B", "T"))
    arguments = parser.parse_args()
    steps = dict(contestants(arguments))
    losses = {name: step() for name, step in steps.items()}  # compiles
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - begin)
    ratios = {
        name: [a / b for a, b in zip(values, times[WHOLE], strict=True)]
        for name, values in times.items()
    }
    for name, values in ratios.items():
        seconds = statistics.median(times[name])
        print(
            f"{name:26} {statistics.median(values):.3f} of LoRA ({min(values):.2f} to "
            f"{max(values):.2f}), {seconds:.3f} s, first loss {losses[name]:.4f}"
        )
    row = {
        **vars(arguments),
        "ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "ratios": ratios,
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "first_loss": losses,
        "device": jax.devices()[0].device_kind,
    }
    record(HERE / "results.jsonl", row)
    draw(ratios)


if __name__ == "__main__":
    main()
