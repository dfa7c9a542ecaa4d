"""A run's directory: what lies where, and who may write there.

    config.yaml        the resolved config, with absolute paths
    metrics.jsonl      one row a logged step or evaluation
    ranks.json         what AdaLoRA left of each module, for a run with it
    before_after.json  held-out losses and answers before training, and after it
    checkpoints/       what ``jqlora resume`` goes on from
    adapter/           the result, in PEFT's format
    plots/ report.html summary.json

``summary.json`` is written last: a directory that has one is complete.

The directory of a sweep has the checkpoints of all its members, and beside them:

    sweep.json         what varies, and the members' settings
    members/NAME/      the rest of each member, as of a run of its own
    results.csv        the members compared
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jqlora.errors import RunError, SaveError

RESULTS = (
    "metrics.jsonl",
    "before_after.json",
    "ranks.json",
    "checkpoints",
    "adapter",
    "plots",
    "report.html",
    "summary.json",
    "bad_batch.npz",
    "sweep.json",
    "members",
    "results.csv",
)
OURS = frozenset({"config.yaml", ".lock", *RESULTS})


class RunDirectory:
    """Paths inside one run directory; making one neither reads nor writes anything."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.before_after = self.path / "before_after.json"
        self.ranks = self.path / "ranks.json"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.plots = self.path / "plots"
        self.report = self.path / "report.html"
        self.summary = self.path / "summary.json"
        self.bad_batch = self.path / "bad_batch.npz"
        self.sweep = self.path / "sweep.json"
        self.members = self.path / "members"
        self.results = self.path / "results.csv"

    def check(self, *, overwrite: bool) -> None:
        """Make the directory for a new run. One in which no training began is taken over.

        Raises RunError where results of a run, or files of anyone else, are in the way, and
        SaveError where the place cannot be written.
        """
        foreign = [name for name in self._entries() if name not in OURS and not _unfinished(name)]
        if foreign:
            raise RunError(
                f"{self.path} holds {foreign[0]!r}, which is no part of a run: "
                "choose another output.directory"
            )
        if self._results() and not overwrite:
            raise RunError(
                f"{self.path} already holds a run: go on with 'jqlora resume {self.path}', choose "
                "another output.directory, or delete it with output.overwrite=true"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SaveError(f"cannot write {self.path}: {error.strerror}") from error

    def clear(self) -> None:
        """Delete an earlier run, its config first: what is left of it cannot be resumed."""
        self.config.unlink(missing_ok=True)
        for path in self._results():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory against a second process; a killed process leaves no lock behind."""
        try:
            handle = os.open(self.path / ".lock", os.O_CREAT | os.O_RDWR, 0o666)
        except OSError as error:
            raise SaveError(f"cannot write {self.path}: {error.strerror}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"another process is training in {self.path}") from error
        else:
            yield
        finally:
            os.close(handle)

    def read_before_after(self) -> dict[str, Any]:
        """What has been measured so far: nothing, ``before``, or ``before`` and ``after``."""
        if not self.before_after.exists():
            return {}
        return json.loads(self.before_after.read_text())

    def _results(self) -> list[Path]:
        return [self.path / name for name in RESULTS if (self.path / name).exists()]

    def _entries(self) -> list[str]:
        if not self.path.exists():
            return []
        if not self.path.is_dir():
            raise RunError(f"{self.path} is a file: choose another output.directory")
        return sorted(entry.name for entry in self.path.iterdir())


def _unfinished(name: str) -> bool:
    """Whether a kill left this behind in the middle of an atomic write."""
    return any(name.startswith(f".{ours}.") for ours in OURS)
