"""Checkpoints kept in 4 bits on the disk, so that the next start reads codes and makes none.

A copy is what ``jqlora quantize`` would write, config.json and safetensors in bitsandbytes' layout,
without a tokenizer; transformers loads it too. Its folder is named by a hash of all that decides
its bytes: paths, sizes and times of the files it was made of, the quantization, the dtype, the
platform that quantized, and the version of all this. So a copy is never out of date, only unused.

It is written under a lock and appears whole or not at all; a second process waits for the first
and reads what that made. ``copy.json`` has a checksum of every tensor, tested as it is read: a copy
that is damaged in any way is made again. Where none can be kept, the checkpoint itself is loaded.
"""

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax

from jqlora.errors import CheckpointError, SaveError
from jqlora.io.atomic import atomic_directory, atomic_write_json
from jqlora.io.checkpoint import Checkpoint, read_config
from jqlora.io.layout import Layout, lay_out
from jqlora.io.quantize_files import head_config, quantized_config, quantized_groups
from jqlora.io.readers import open_directory
from jqlora.io.readers.checked import Checked, checksum
from jqlora.io.save import MAX_SHARD_BYTES
from jqlora.io.shards import Group, write_weights
from jqlora.quant import BlockQuant, QTensor
from jqlora.quant.spec import FourBit
from jqlora.types import Progress

FORMAT = 1
"""Raised whenever the same origin would come to other bytes."""
RECORD = "copy.json"
_OURS = re.compile(r"\.?(nf4|fp4)-[0-9a-f]{32}\b.*")
T = TypeVar("T")
logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """``$JQLORA_CACHE``, or ``jqlora`` in ``$XDG_CACHE_HOME`` or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("JQLORA_CACHE") or Path(home) / "jqlora").expanduser()


@dataclass(frozen=True)
class Cache:
    """A folder of copies, for ``jq.load(..., cache=jq.Cache())``. It may be deleted at any time.

    ``say`` is told in one line when a copy is read, made, or found to be of no use.
    """

    folder: Path = dataclasses.field(default_factory=cache_folder)
    say: Callable[[str], None] = logger.info

    def copy_of(
        self,
        checkpoint: Checkpoint,
        spec: BlockQuant | None,
        skip: tuple[str, ...],
        model: Any,
        layout: Layout,
    ) -> "Copy | None":
        """Where ``checkpoint``, laid out for ``model``, is kept or would be; None for what files
        have no place for (8-bit blocks), or what need not be quantized."""
        quantized = any(isinstance(leaf, QTensor) for leaf in layout.leaves.values())
        if not quantized or not isinstance(spec, FourBit) or spec.storage != "uint8":
            return None
        origin = {
            "format": FORMAT,
            "files": _files(checkpoint),
            "quantize": repr(spec),
            "skip": list(skip),
            "dtype": model.config.dtype,
            "task": checkpoint.task,
            "drawn": [item.hf for item in layout.fresh],
            "platform": jax.default_backend(),
        }
        key = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:32]
        path = self.folder.expanduser().absolute() / "quantized" / f"{spec.scheme}-{key}"
        return Copy(path, origin, checkpoint, model, layout, skip, self.say)

    def copies(self) -> list[Path]:
        """The folders of all whole copies."""
        return sorted(record.parent for record in self.folder.glob(f"quantized/*/{RECORD}"))

    def kept(self) -> dict[Path, str]:
        """All copies, and the folders of compiled programs beside them, and what each is."""
        found = {}
        for path in self.copies():
            record = read_config(path / RECORD)
            origin = record.get("origin", {})
            words = (record.get("date"), record.get("source"), origin.get("quantize"))
            found[path] = " ".join(map(str, words))
        programs = self.folder.glob("programs/" + "[0-9a-f]" * 16)
        return found | dict.fromkeys(sorted(programs), "compiled programs")

    def clear(self) -> None:
        """Delete all that is kept, and nothing else that may lie in the folder."""
        for path in self.kept():
            shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob("quantized/*"):
            if _OURS.fullmatch(path.name):  # locks, damaged copies, and what a kill left behind
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Copy:
    """One checkpoint, kept in the folder ``path``, which may not be there yet."""

    path: Path
    origin: dict[str, Any]
    checkpoint: Checkpoint
    model: Any
    layout: Layout
    skip: tuple[str, ...]
    say: Callable[[str], None]

    def load(self, read: Callable[[Layout], T], progress: Progress | None = None) -> T:
        """``read`` of the copy, which is made first where there is none that is sound; of the
        checkpoint's own files where none can be kept."""
        label, before = self.checkpoint.source.label, self._stamp()
        if before is not None:
            self.say(f"reading the 4-bit codes of {label} kept in {self.path}")
            if (found := self._attempt(read)) is not None:
                return found
        if self._make(before, progress) and (found := self._attempt(read)) is not None:
            return found
        return read(self.layout)

    def _attempt(self, read: Callable[[Layout], T]) -> T | None:
        try:
            return read(self._laid_out())
        except CheckpointError as error:
            self.say(f"the copy is damaged and of no use: {error}")
            return None

    def _laid_out(self) -> Layout:
        sums = read_config(self.path / RECORD).get("checksums", {})
        kept = dataclasses.replace(
            self.checkpoint,
            config=read_config(self.path / "config.json"),
            reader=Checked(open_directory(self.path), sums),
        )
        layout = lay_out(kept, self.model, None, self.skip)
        drawn = {item.path: self.layout.leaves[item.path] for item in self.layout.fresh}
        layout = dataclasses.replace(layout, leaves={**layout.leaves, **drawn})
        if layout.leaves != self.layout.leaves:
            raise CheckpointError(f"{self.path} holds other arrays than asked for")
        return layout

    def _make(self, before: tuple[int, ...] | None, progress: Progress | None) -> bool:
        """Write the copy, unless another process has since it was as ``before``; whether it is
        there now."""
        try:
            with self._locked():
                if self._stamp() == before:
                    self.say(
                        f"keeping the 4-bit codes of {self.checkpoint.source.label} for the next "
                        f"start in {self.path} ('jqlora cache --clear' deletes them)"
                    )
                    self._write(progress)
        except SaveError as error:
            self.say(f"no copy is kept: {error}")
            return False
        return True

    def _write(self, progress: Progress | None) -> None:
        config = quantized_config(self.checkpoint, self.model, self.layout, self.origin["dtype"])
        if self.checkpoint.other_head:
            config |= head_config(self.checkpoint, self.model)
        sums: dict[str, int] = {}
        groups = quantized_groups(self.layout, self.origin["dtype"])
        for left in self.path.parent.glob(f".{self.path.name}.*"):
            shutil.rmtree(left, ignore_errors=True)  # of a process that was killed
        with atomic_directory(self.path, replaces=("*",)) as folder:
            checked = [_with_checksums(group, sums) for group in groups]
            write_weights(folder, checked, max_shard_bytes=MAX_SHARD_BYTES, progress=progress)
            atomic_write_json(folder / "config.json", config)
            source, date = self.checkpoint.source.label, time.strftime("%Y-%m-%d")
            record = {"source": source, "date": date, "origin": self.origin, "checksums": sums}
            atomic_write_json(folder / RECORD, record)
            if _files(self.checkpoint) != self.origin["files"]:
                raise SaveError(f"{source} changed while it was read")

    def _stamp(self) -> tuple[int, ...] | None:
        """Tells this copy from one that another process put in its place; None for no copy."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone in making this copy; a killed process leaves no lock behind."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(f"{self.path}.lock", os.O_CREAT | os.O_RDWR, 0o666)
        except OSError as error:
            raise SaveError(f"cannot write {self.path}: {error.strerror or error}") from error
        try:
            self._wait_for(handle)
            yield
        finally:
            os.close(handle)

    def _wait_for(self, handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.say(f"another process is writing {self.path}: waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:  # file systems without locks
            raise SaveError(f"cannot lock {self.path}: {error.strerror or error}") from error


def bytes_of(path: Path) -> int:
    """What the files below ``path`` take."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _with_checksums(group: Group, sums: dict[str, int]) -> Group:
    """``group``, entering what it loads into ``sums``."""

    def load() -> dict[str, Any]:
        arrays = dict(group.load())
        sums.update({name: checksum(array) for name, array in arrays.items()})
        return arrays

    return dataclasses.replace(group, load=load)


def _files(checkpoint: Checkpoint) -> list[list[Any]]:
    """Path, size and time of all files that the tensors come from, and of the config."""
    reader = checkpoint.reader
    paths = {Path(reader.where(name)) for name in reader.names()}
    config = checkpoint.source.folder / "config.json"
    states = [(p.resolve(), p.stat()) for p in paths | ({config} if config.exists() else set())]
    return sorted([str(p), state.st_size, state.st_mtime_ns] for p, state in states)
