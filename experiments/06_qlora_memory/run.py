"""Does QLoRA hold what it promises, 65B in 48 GB and 33B in 24, and how far ahead of it are we?

    pip install -e '.[aot]' nvidia-cudnn-cu13                     # Python 3.12; no GPU
    python experiments/06_qlora_memory/run.py                      # an hour on two cores
    python experiments/06_qlora_memory/run.py --cases 7b/2048 --states 8bit --devices h100

``jqlora plan``'s own code compiles the whole training step for GPUs that need not be there, from a
config.json alone: NF4 base with double quantization, rank 64 on all linear layers, bf16 adapters,
one row, whole layers recomputed. AdamW keeps its moments on the device in bf16 or in 8 bits, or in
32 bits on the host. Beside the compiler's figure stands the analytic estimate, which needs nothing
but the shapes. One line a case goes to ``results.jsonl``.
"""

import argparse
import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

from jqlora.config import RunConfig, read_config
from jqlora.run.estimate import estimate_step
from jqlora.run.memory import compile_step
from jqlora.run.record import record
from jqlora_kernels import aot
from jqlora_kernels.aot_targets import TARGETS

HERE = Path(__file__).parent
GIB = 2**30
MODELS = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40},
    "33b": {"hidden_size": 6656, "intermediate_size": 17920, "num_hidden_layers": 60},
    "65b": {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80},
}
AIMS = {"65b/512": 40, "65b/2048": 44, "33b/512": 22, "13b/512": 10, "7b/2048": 6.5}
"""GiB at most, by model and tokens."""
STATES = {
    "bf16": ["train.optimizer=adamw16bit"],
    "8bit": ["train.optimizer=adamw8bit"],
    "host": ["train.offload=all"],
}
SMALL = ("rtx4090", "rtx3090")
"""Asked of models that may fit 24 GB."""


def config_of(case: str, state: str, folder: Path) -> RunConfig:
    """The run of a case, on a model of which there is a config.json."""
    name, tokens = case.split("/")
    sizes = MODELS[name]
    heads = sizes["hidden_size"] // 128
    model = folder / name
    model.mkdir(exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **sizes,
    }
    (model / "config.json").write_text(json.dumps(config))
    run = folder / "run.yaml"
    run.write_text(
        f"model: {{source: {model}, quantize: {{}}, remat: full}}\n"
        "method: {name: lora, rank: 64, dtype: bfloat16}\n"
        f"data: {{train: nowhere.jsonl, length: {tokens}}}\n"
        "train: {steps: 1000, batch_size: 1}\n"
        f"output: {{directory: {folder / 'out'}}}\n"
    )
    return read_config([run], STATES[state])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(AIMS), metavar="MODEL/TOKENS")
    parser.add_argument("--states", nargs="+", default=list(STATES), choices=STATES)
    parser.add_argument("--devices", nargs="+", choices=TARGETS)
    arguments = parser.parse_args()
    if (lack := aot.missing()) is not None:
        raise SystemExit(lack)
    for case in arguments.cases:
        small = () if case.startswith("65b") else SMALL
        for device in arguments.devices or ("h100", *small):
            for state in arguments.states:
                measure(case, device, state)


def measure(case: str, device: str, state: str) -> None:
    """Compile one step, print it and keep it."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(case, state, Path(folder))
        start = time.perf_counter()
        found = compile_step(config, TARGETS[device])
        seconds = time.perf_counter() - start
        guessed = estimate_step(config, "for comparison")
    row = {
        "case": case,
        "device": device,
        "state": state,
        "aim_gib": AIMS.get(case),
        "peak_gib": found.peak / GIB,
        "estimated_gib": guessed.peak / GIB,
        "fits": found.fits(TARGETS[device]),
        "bytes": dataclasses.asdict(found),
        "compile_seconds": seconds,
    }
    aim = f" (aim {row['aim_gib']})" if row["aim_gib"] else ""
    off = guessed.peak / found.peak - 1
    print(
        f"{case:9} {device:8} {state:5} {row['peak_gib']:7.3f} GiB{aim}, of which temporaries "
        f"{found.temporaries / GIB:.3f}; on the host {found.host / GIB:.3f}; estimated "
        f"{row['estimated_gib']:.3f} ({off:+.1%})",
        flush=True,
    )
    record(HERE / "results.jsonl", row)


if __name__ == "__main__":
    main()
