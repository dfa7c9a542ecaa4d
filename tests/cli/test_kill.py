"""Runs killed with SIGKILL at random moments, resumed, and compared bit for bit."""

import random
import shutil
import signal
import time

from jqlora.train.directory import RunDirectory
from jqlora.train.metrics import WALL_CLOCK, read_metrics
from tests.cli.process import start
from tests.train.compilations import STEP

KILLS = 2


def wait_until_training(process, run, steps):
    """Return when ``steps`` rows are logged, or the process has ended."""
    while process.poll() is None:
        if len(read_metrics(run / "metrics.jsonl")) >= steps:
            return
        time.sleep(0.02)


def rows(run):
    found = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in found]


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(finished, toy, cache, tmp_path):
    run = tmp_path / "run"
    seed = random.randrange(10**6)
    print("kills drawn with seed", seed)
    draw = random.Random(seed)

    words = ["train", toy / "config.yaml", f"output.directory={run}"]
    for _ in range(KILLS):
        process = start(*words, cache=cache)
        wait_until_training(process, run, len(read_metrics(run / "metrics.jsonl")) + 1)
        time.sleep(draw.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
        assert run.exists()
        if (run / "summary.json").exists():
            break
        words = ["resume", run]
    if not (run / "summary.json").exists():
        process = start(*words, cache=cache, JAX_LOG_COMPILES="1")
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        assert errors.count(STEP) == 1

    assert rows(run) == rows(finished)
    for name in ("adapter/adapter_model.safetensors", "before_after.json"):
        assert (run / name).read_bytes() == (finished / name).read_bytes(), name


def test_sigterm_ends_cleanly_and_says_how_to_go_on(toy, cache, tmp_path):
    run = tmp_path / "run"
    words = ["train", toy / "config.yaml", f"output.directory={run}", "train.steps=100000"]
    process = start(*words, cache=cache)
    wait_until_training(process, run, 8)
    process.terminate()
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM
    assert f"jqlora resume {run}" in errors
    assert "Traceback" not in errors
    assert list((run / "checkpoints").iterdir())


def test_two_processes_cannot_train_in_one_directory(finished, tmp_path, complain):
    copy = RunDirectory(shutil.copytree(finished, tmp_path / "run"))
    copy.summary.unlink()
    with copy.locked():
        assert "another process" in complain("resume", copy.path)
