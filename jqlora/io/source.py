"""From what a user writes to the files that hold a model.

A source is one string of four kinds:

* a directory in Hugging Face's layout (``config.json`` and weights), or one with one ``.gguf``;
* a ``.gguf`` file;
* ``package:NAME[/PATH]``, what an installed package carries, found without importing it;
* a hub id ``ORG/NAME[@REVISION]`` or, for one GGUF of a repository, ``ORG/NAME/FILE.gguf``.

What exists on the disk wins over the hub. Absence and ambiguity are errors that list what was
found.
"""

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jqlora.errors import SourceError
from jqlora.io import hub

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+){0,2}(@[\w./-]+)?")


@dataclass(frozen=True)
class Source:
    """Where a model's files are: a directory for ``hf-dir``, one file for ``gguf``."""

    kind: Literal["hf-dir", "gguf"]
    path: Path
    label: str

    @property
    def folder(self) -> Path:
        """The directory that holds the files."""
        return self.path if self.kind == "hf-dir" else self.path.parent


def resolve(source: str | os.PathLike | Source) -> Source:
    """Find the model that ``source`` names, downloading it if it is a hub id.

    Raises SourceError if there is none, or more than one.
    """
    if isinstance(source, Source):
        return source
    label = os.fspath(source)
    if label.startswith("package:"):
        return _in_package(label)
    path = Path(label).expanduser()
    if path.exists():
        return _at_path(path, label)
    if label.endswith(".gguf") and label.count("/") == 2 and not label.startswith((".", "/", "~")):
        return Source("gguf", hub.download_file(label), label)
    if not _HUB_ID.fullmatch(label) or label.startswith(".") or label.endswith(".gguf"):
        raise SourceError(f"no file or directory {label!r} (looked in {Path.cwd()})")
    return _at_path(hub.download_model(label), label)


def _at_path(path: Path, label: str) -> Source:
    if path.is_file():
        if path.suffix == ".gguf":
            return Source("gguf", path, label)
        raise SourceError(
            f"{label!r} is a file but not a .gguf; give the directory that holds config.json"
        )
    if _is_model_directory(path):
        return Source("hf-dir", path, label)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return Source("gguf", ggufs[0], label)
    if ggufs:
        raise SourceError(f"{label!r} holds several models: {_names(ggufs, path)}; give one file")
    if (path / "config.json").exists():
        raise SourceError(
            f"{label!r} has a config.json but no weights: found {_listing(path)}; "
            f"accepted are {', '.join(WEIGHTS)}"
        )
    raise SourceError(
        f"{label!r} holds no model (neither config.json nor a .gguf file): found {_listing(path)}"
    )


def _in_package(label: str) -> Source:
    name, _, inside = label.removeprefix("package:").partition("/")
    module = name.replace("-", "_")
    # find_spec of a top-level name runs no code of the package; a dotted name would import parents
    if not module.isidentifier():
        raise SourceError(f"{label!r}: {name!r} is not the name of a package")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(
            f"{label!r}: no package {module!r} is installed (pip install --no-deps {name})"
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    if inside:
        if not (root / inside).exists():
            raise SourceError(f"{label!r}: no {inside!r} in {root}: found {_listing(root)}")
        return _at_path(root / inside, label)
    found = sorted(root.rglob("*.gguf"))
    found += sorted(p.parent for p in root.rglob("config.json") if _is_model_directory(p.parent))
    if not found:
        raise SourceError(f"{label!r}: {root} carries no model: found {_listing(root)}")
    if len(found) > 1:
        raise SourceError(
            f"{label!r} carries several models: {_names(found, root)}; "
            f"add one of them: package:{name}/..."
        )
    return _at_path(found[0], label)


def _is_model_directory(path: Path) -> bool:
    return (path / "config.json").exists() and any((path / name).exists() for name in WEIGHTS)


def _names(paths: list[Path], root: Path) -> str:
    return ", ".join(str(path.relative_to(root)) for path in paths)


def _listing(folder: Path, count: int = 8) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more if names else "nothing"
