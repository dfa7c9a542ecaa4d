"""Going on with what was interrupted, a run or a sweep of several."""

import dataclasses
from pathlib import Path

from jqlora.config import read_config
from jqlora.errors import RunError
from jqlora.run.session import Say, prepare
from jqlora.run.sweep import resume_sweep
from jqlora.run.training import Outcome, say_on_stderr, train_in
from jqlora.train.directory import RunDirectory


def resume(directory: str | Path, *, say: Say = say_on_stderr) -> Outcome:
    """Go on with an interrupted run or sweep from its last sound checkpoint, bit for bit.

    Raises RunError where there is no run, or where it is complete.
    """
    run = RunDirectory(Path(directory).absolute())
    if not run.config.exists():
        raise RunError(f"{run.path} holds no run (no config.yaml): start one with 'jqlora train'")
    if run.summary.exists():
        raise RunError(f"the run in {run.path} is complete: see {run.report}")
    with run.locked():
        if run.sweep.exists():
            return resume_sweep(run, say)
        config = read_config([run.config])
        moved = dataclasses.replace(config.output, directory=str(run.path))
        config = dataclasses.replace(config, output=moved)
        return train_in(config, run, prepare(config, say), say)
