"""A run with AdaLoRA from its config to its pictures."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqlora.attach import bind
from jqlora.config import AdaLoRAConfig, read_config
from jqlora.io import load, load_adapter
from jqlora.run import plan_run, train
from jqlora.train.metrics import read_metrics
from jqlora.train.rank_plots import rank_table

pytestmark = pytest.mark.usefixtures("compile_quickly", "keep_programs")

METHOD = AdaLoRAConfig(
    init_rank=4,
    target_rank=2,
    alpha=8,
    initial_steps=3,
    final_steps=4,
    interval=2,
    orthogonality_weight=0.1,
)


def config_of(toy, method, directory):
    config = read_config([toy / "config.yaml"], ["train.steps=12", "train.eval_every=0"])
    output = dataclasses.replace(config.output, directory=str(directory))
    model = dataclasses.replace(config.model, quantize=None)
    sample = dataclasses.replace(config.sample, max_new_tokens=2)
    return dataclasses.replace(config, method=method, output=output, model=model, sample=sample)


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    directory = tmp_path_factory.mktemp("adalora") / "run"
    train(config_of(toy, METHOD, directory), say=lambda text: None)
    return directory


def test_metrics_show_the_budget_and_the_rank_as_whole_numbers(run):
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["budget"] for row in rows[:3]] == [56] * 3
    assert [row["budget"] for row in rows[-5:]] == [28] * 5
    assert [row["rank"] for row in rows[-5:]] == [28] * 5
    assert all(row["penalty"] > 0 for row in rows)
    assert '"budget": 56, ' in (run / "metrics.jsonl").read_text()


def test_the_adapter_holds_what_was_kept_and_nothing_else(run, toy):
    ranks = json.loads((run / "ranks.json").read_text())
    assert ranks["init_rank"] == 4
    assert len(ranks["modules"]) == 14
    left = {name: sum(module["kept"]) for name, module in ranks["modules"].items()}
    assert sum(left.values()) == 28
    model, params = load(str(toy / "model"))
    plan, adapters = load_adapter(run / "adapter", model, params)
    kept = {n: sum(flags) for n, flags in dict(plan.placements[0].spec.rank_pattern).items()}
    assert kept == left
    summary = json.loads((run / "summary.json").read_text())
    assert summary["ranks"] == {
        "initial": 56,
        "final": 28,
        "smallest": min(left.values()),
        "largest": max(left.values()),
        "parameters": plan.trainable_count,
    }
    assert summary["method"] == "adalora rank 4 to a mean of 2, alpha 8"
    ids = jnp.arange(6, dtype=jnp.int32)[None]
    logits = jax.jit(bind(model, plan))({"params": params, **adapters}, ids).logits
    assert np.isfinite(logits).all()


def test_the_report_shows_where_the_ranks_went(run):
    table, kinds, layers = rank_table(json.loads((run / "ranks.json").read_text()))
    assert table.sum() == 28
    assert layers == ["0", "1"]
    assert kinds[0] == "self_attn.q_proj"
    assert table.shape == (7, 2)
    for name in ("ranks", "budget", "importance"):
        assert (run / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (run / "report.html").read_text()
    assert "<h2>Ranks</h2>" in page
    assert "56 triplets at first, 28 at last" in page


def test_the_plan_tells_the_budget(toy, tmp_path):
    sizes = plan_run(config_of(toy, METHOD, tmp_path))
    assert sizes.lines()[-1] == (
        "ranks      56 triplets until step 3, cut every 2 steps to 28 at step 8 of 12: "
        "4.0 a module to 2.0 on average"
    )


def test_the_plan_of_epochs_tells_the_budget_without_its_steps(toy, tmp_path):
    config = config_of(toy, METHOD, tmp_path)
    epochs = dataclasses.replace(config.train, steps=None, epochs=3.0)
    assert plan_run(dataclasses.replace(config, train=epochs)).lines()[-1] == (
        "ranks      56 triplets, cut every 2 steps of the middle of the run to 28: "
        "4.0 a module to 2.0 on average"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["initial_steps=9", "final_steps=4"], "initial_steps=9 and final_steps=4 leave none of"),
        (["target_rank=5"], "target_rank=5 must not exceed init_rank=4"),
        (["target_total_rank=56"], "target of 56 triplets must lie between 1 and 55"),
        (["rank=3"], "method.rank is not a setting; nearest: method.init_rank"),
        (["interval=0"], "method.interval=0 should be greater than or equal to 1"),
        (["betas=[0.9, 1.0]"], r"method.betas=\[0.9, 1.0\] should be less than 1"),
    ],
)
def test_settings_that_cannot_be_are_one_line_with_the_numbers(settings, message, toy, complain):
    words = ["name=adalora", "init_rank=4", "target_rank=2", *settings]
    overrides = [f"method.{word}" for word in words]
    line = complain("plan", toy / "config.yaml", "train.steps=12", *overrides)
    assert re.search(message, line)
