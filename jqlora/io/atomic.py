"""Writing that either happens wholly or leaves what was there before.

Everything is written beside its target under a hidden name, flushed to the disk, and renamed. A
process killed at any moment leaves the earlier file or directory, never half of a new one. A full
disk, a read-only folder and the like end in one :class:`~jqlora.errors.SaveError`.
"""

import fnmatch
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jqlora.errors import JqloraError, SaveError

# What saved models and adapters consist of: an existing directory that holds anything else is not
# replaced, so that a mistyped target cannot delete a user's files.
SAVED_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "*config*.json",
    "*.jinja",
    "tokenizer*",
    "vocab*",
    "spiece.model",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)


def atomic_write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write ``data`` to ``path``, creating its folder; an existing file is replaced at the end.

    Raises SaveError when the disk is full or the place cannot be written.
    """
    target = Path(path)
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _sync_directory(target.parent)


def atomic_write_text(path: str | os.PathLike, text: str) -> None:
    """Write ``text`` as UTF-8; as :func:`atomic_write_bytes`."""
    atomic_write_bytes(path, text.encode())


def atomic_write_json(path: str | os.PathLike, value: Any) -> None:
    """Write ``value`` as indented JSON with a final newline; as :func:`atomic_write_bytes`."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def atomic_directory(
    path: str | os.PathLike, *, replaces: Sequence[str] = SAVED_FILES
) -> Iterator[Path]:
    """Yield an empty directory beside ``path``; it becomes ``path`` when the block ends well.

    If the block raises, ``path`` stays as it was. An existing ``path`` is replaced only if the name
    of every entry matches one of the patterns ``replaces``. Raises SaveError (also for any OSError
    inside the block).
    """
    target = Path(os.path.abspath(path))
    previous = target.with_name(f".{target.name}.previous")
    with _writing(target):
        if previous.exists() and not target.exists():
            os.rename(previous, target)  # an earlier save was killed between its two renames
        _check_replaceable(target, replaces)
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            os.chmod(fresh, 0o777 & ~_umask())
            yield fresh
            _sync_tree(fresh)
            if target.exists():
                shutil.rmtree(previous, ignore_errors=True)
                os.rename(target, previous)
            try:
                os.rename(fresh, target)
            except OSError:
                if previous.exists():
                    os.rename(previous, target)
                raise
        except SaveError as error:  # of a file inside: name it by where it was to be
            raise SaveError(str(error).replace(str(fresh), str(target))) from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        _sync_directory(target.parent)
        shutil.rmtree(previous, ignore_errors=True)


def _check_replaceable(target: Path, replaces: Sequence[str]) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise SaveError(f"{target} is a file; choose another place for a directory")
    for entry in sorted(target.iterdir()):
        if not any(fnmatch.fnmatch(entry.name, pattern) for pattern in replaces):
            raise SaveError(
                f"{target} already holds {entry.name!r}, which saving would delete: "
                "choose another directory or move it away"
            )


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turn every OSError into a sentence about ``target``."""
    try:
        yield
    except JqloraError:
        raise
    except OSError as error:
        raise SaveError(f"cannot write {target}: {error.strerror or error}") from error


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_directory(Path(root))


def _sync_directory(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power cut, where directories can be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
