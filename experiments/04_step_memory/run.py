"""How much device memory does a QLoRA step take at 7B and 65B, by where AdamW keeps its moments?

    pip install -e '.[aot]'
    python experiments/04_step_memory/run.py                       # no GPU, some minutes
    python experiments/04_step_memory/run.py --models 65b --states device host

The whole training step (NF4 base with double quantization, rank 64 on all linear layers, fp32
adapters, whole layers recomputed, one row of 512 tokens) is compiled for an H100 that need not be
there, and the compiler's assignment of buffers is read. Nothing runs: the allocator's overhead and
what the driver takes come on top, and attention is XLA's, because cuDNN's needs its libraries.
Prediction: moving the state to the host saves its size, since pages fit into memory that the step
has anyway. One line a case goes to ``results.jsonl``.
"""

import argparse
import os
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JQLORA_KERNELS"] = "triton"

import jax
import jax.numpy as jnp

import jqlora as jq
from jqlora.models import LlamaConfig, LlamaForCausalLM, abstract_params
from jqlora.optim.residence import planned, planned_residence
from jqlora.quant import quantize_params
from jqlora.run.record import record
from jqlora.train.placement import compiled_bytes, lower_on
from jqlora_kernels import aot
from jqlora_kernels.aot_targets import TARGETS

HERE = Path(__file__).parent
GIB = 2**30
BUS = 55e9
"""Assumed bytes a second between host and device, one way: PCIe 5 x16, not measured."""
MODELS = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    "65b": {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80},
}
STATES = {
    "device": {},
    "8 bits": {"bits": 8},
    "host": {"offload": "all"},
    "8 bits, host": {"bits": 8, "offload": "all"},
}


def compiled(sizes: dict, options: dict, tokens: int, rank: int, target: str):
    """The compiled step, and where how many bytes of the optimizer's state are in it."""
    heads = sizes["hidden_size"] // 128
    config = LlamaConfig(
        vocab_size=32000,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=128,
        **sizes,
    )
    types = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    model = LlamaForCausalLM(config, remat="full", attention="xla", **types)
    params = quantize_params(abstract_params(model), jq.NF4(double_quant=True))
    plan = jq.plan(model, params, jq.LoRA(rank=rank, targets="all-linear"))
    tx = jq.optim.adamw(1e-4, **options)
    key = jax.random.key(0)

    def create():
        return jq.TrainState.create(jq.init(key, plan), tx, key)

    row = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    batch = dict.fromkeys(("input_ids", "positions", "segment_ids", "loss_mask"), row)
    step = jq.make_train_step(jq.bind(model, plan), tx)
    homes = planned_residence(*planned(lambda: create().opt_state))
    return lower_on(aot.mesh(TARGETS[target]), step, create, params, batch).compile(), homes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--states", nargs="+", default=list(STATES), choices=STATES)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--device", default="h100", choices=TARGETS)
    arguments = parser.parse_args()
    if (lack := aot.missing()) is not None:
        raise SystemExit(lack)
    for model in arguments.models:
        for name in arguments.states:
            start = time.perf_counter()
            program, homes = compiled(
                MODELS[model], STATES[name], arguments.tokens, arguments.rank, arguments.device
            )
            memory = program.memory_analysis()
            row = {
                "model": model,
                "state": name,
                "tokens": arguments.tokens,
                "rank": arguments.rank,
                "device": arguments.device,
                "device_gib": compiled_bytes(program) / GIB,
                "temporaries_gib": memory.temp_size_in_bytes / GIB,
                "state_on_device_gib": homes.device / GIB,
                "state_on_host_gib": homes.host / GIB,
                "transfer_seconds_predicted": 2 * homes.host / BUS,
                "compile_seconds": time.perf_counter() - start,
            }
            print(
                f"{model:4} {name:13} {row['device_gib']:7.3f} GiB on the device, of which "
                f"temporaries {row['temporaries_gib']:.3f}; state {row['state_on_device_gib']:.3f} "
                f"there, {row['state_on_host_gib']:.3f} on the host "
                f"({row['transfer_seconds_predicted']:.3f} s both ways at {BUS / 1e9:.0f} GB/s)",
                flush=True,
            )
            record(HERE / "results.jsonl", row)


if __name__ == "__main__":
    main()
