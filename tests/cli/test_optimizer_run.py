"""A run whose 8-bit moments live in host memory: what is said of it, and that it can be resumed."""

import json
import shutil

import pytest

from jqlora.cli import main
from jqlora.train.metrics import WALL_CLOCK, read_metrics
from tests.toy_checkpoint import write_config, write_model

pytestmark = pytest.mark.usefixtures("compile_quickly", "keep_programs")

WIDTH, LAYERS, RANK = 512, 2, 128
MOVED = 2 * 2 * LAYERS * WIDTH * RANK  # both moments of both factors, a byte an element
SETTINGS = {
    "model.quantize": None,
    "method.targets": ["q_proj"],
    "method.rank": RANK,
    "data.heldout": None,
    "data.general": None,
    "train.steps": 6,
    "train.batch_size": 2,
    "train.accumulate": 1,
    "train.optimizer": "adamw8bit",
    "train.offload": "all",
    "sample.prompts": [],
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The config of a model with matrices large enough for their moments to be moved."""
    folder = tmp_path_factory.mktemp("offload")
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH}
    return write_config(
        folder, **SETTINGS, **{"model.source": str(write_model(folder / "wide", **sizes))}
    )


@pytest.fixture(scope="module")
def run(config):
    assert main(["train", str(config)]) == 0
    return config.parent / "run"


def rows(run):
    found = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in found]


@pytest.mark.parametrize(
    ("offload", "line"),
    [
        ("all", "host       512.0 KiB of optimizer state, streamed through every update"),
        ("auto", "host       up to 512.0 KiB of optimizer state, as the first step finds room"),
    ],
)
def test_the_plan_says_where_the_moments_will_be(offload, line, config, capsys):
    assert main(["plan", str(config), f"train.offload={offload}"]) == 0
    assert line in capsys.readouterr().out


def test_the_summary_says_where_they_were(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["optimizer"] == "adamw8bit"
    assert summary["optimizer_bytes"]["host"] == MOVED == 512 * 1024
    # the scales of their blocks, and counts of updates
    assert 0 < summary["optimizer_bytes"]["device"] - 4 * MOVED // 256 < 20


def test_it_is_resumed_bit_for_bit_though_the_moments_are_elsewhere_then(run, tmp_path, capsys):
    again = shutil.copytree(run, tmp_path / "run")
    (again / "summary.json").unlink()
    shutil.rmtree(again / "checkpoints" / "000006")
    config = again / "config.yaml"
    config.write_text(config.read_text().replace("offload: all", "offload: auto"))
    assert main(["resume", str(again)]) == 0
    said = capsys.readouterr().err
    assert "going on from step 3 of 6" in said
    assert "optimizer state: stays on the device" in said
    assert json.loads((again / "summary.json").read_text())["optimizer_bytes"]["host"] == 0
    assert rows(again) == rows(run)
    adapter = "adapter/adapter_model.safetensors"
    assert (again / adapter).read_bytes() == (run / adapter).read_bytes()
