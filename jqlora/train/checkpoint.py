"""Checkpoints from which a run goes on bit for bit, or not at all.

A checkpoint is a directory ``checkpoints/000040/`` with ``state/`` (written by orbax: adapters,
optimizer state, step, key), ``loader.json`` (where the data order stands) and ``manifest.json``
(the SHA-256 of every other file). It appears by one rename when it is whole. The manifest guards
against what a rename cannot see, such as a copy cut short: a checkpoint that disagrees with its
manifest is passed over, with a message, for the one before it.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jqlora.errors import RunError, SaveError
from jqlora.io.atomic import atomic_directory, atomic_write_json
from jqlora.optim.offload import on_host
from jqlora.train.state import TrainState

MANIFEST = "manifest.json"


class Checkpoints:
    """The checkpoints of one run; the newest ``keep`` stay. ``say`` gets messages for the user."""

    def __init__(self, directory: str | Path, *, keep: int = 2, say: Callable[[str], None] = print):
        self.directory = Path(directory)
        self.keep = keep
        self.say = say

    def clean(self) -> None:
        """Remove what saves that were killed left behind."""
        for path in self.directory.glob(".*"):
            shutil.rmtree(path, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps at which a directory stands, oldest first; what it holds is not looked at."""
        if not self.directory.is_dir():
            return []
        names = [path.name for path in self.directory.iterdir() if path.is_dir()]
        return sorted(int(name) for name in names if re.fullmatch(r"\d{6,}", name))

    def save(self, state: TrainState, loader: dict[str, Any]) -> Path:
        """Write ``state`` and the loader's position under the state's step; drop old checkpoints.

        Raises SaveError when the disk is full or read-only; earlier checkpoints stay as they were.
        """
        step = int(state.step)
        target = self._path(step)
        with atomic_directory(target, replaces=("*",)) as fresh:
            _write_state(fresh / "state", state)
            atomic_write_json(fresh / "loader.json", loader)
            atomic_write_json(fresh / MANIFEST, _digests(fresh))
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self._path(old), ignore_errors=True)
        return target

    def restore_latest(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest sound checkpoint, as ``(state, loader position)``; None where there is none.

        ``like`` gives the tree, shapes, dtypes, shardings and memories; where arrays lived in the
        run that saved them does not matter, so an optimizer's ``offload`` may be another now.
        Raises RunError when a sound checkpoint holds another tree: then it belongs to another
        configuration.
        """
        for step in reversed(self.steps()):
            path = self._path(step)
            damage = _damage(path)
            if damage is not None:
                self.say(f"checkpoint {path} is damaged ({damage}); trying the one before it")
                continue
            return _read_state(path / "state", like), json.loads((path / "loader.json").read_text())
        return None

    def _path(self, step: int) -> Path:
        return self.directory / f"{step:06d}"


def _write_state(path: Path, state: TrainState) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            checkpointer.save(path.absolute(), state)
            checkpointer.wait_until_finished()
        except (ValueError, RuntimeError) as error:  # how tensorstore tells of a full disk
            raise SaveError(f"cannot write the checkpoint {path.parent}: {error}") from error


def _read_state(path: Path, like: TrainState) -> TrainState:
    template = jax.tree.map(_asked_for, like)
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            restored = checkpointer.restore(path.absolute(), template)
        except (ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise RunError(f"checkpoint {path.parent} belongs to another run: {reason}") from error
    return jax.tree.map(
        lambda leaf, wanted: jax.device_put(leaf, wanted.sharding) if on_host(wanted) else leaf,
        restored,
        like,
    )


def _asked_for(leaf: Any) -> Any:
    """What orbax is to restore a leaf as. As it does not restore into another memory than was saved
    from, what belongs on the host is asked for as numpy: the device may have no room for it."""
    if on_host(leaf):
        return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
    return ocp.utils.to_shape_dtype_struct(leaf)


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None where it is sound."""
    try:
        expected = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return f"no {MANIFEST}"
    except ValueError:
        return f"{MANIFEST} is not JSON"
    found = _digests(folder)
    for name, digest in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != digest:
            return f"{name} has changed"
    return None
