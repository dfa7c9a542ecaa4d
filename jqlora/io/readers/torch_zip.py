"""``pytorch_model.bin`` without torch, and without running what is inside.

Since torch 1.6 such a file is a zip archive: ``data.pkl`` says, in pickle, how tensors view
numbered storages, and ``data/0``, ``data/1``, ... hold their bytes uncompressed. A pickle may name
any function for the reader to call; here the names are looked up in a table of the few that rebuild
tensors, each replaced by a description of the tensor, and any other name is an error. No bytes of a
storage are read before ``read``.
"""

import io
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jqlora.errors import CheckpointError
from jqlora.io.readers.base import TensorInfo

_STORAGES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "DoubleStorage": np.float64,
        "FloatStorage": np.float32,
        "HalfStorage": np.float16,
        "BFloat16Storage": ml_dtypes.bfloat16,
        "LongStorage": np.int64,
        "IntStorage": np.int32,
        "ShortStorage": np.int16,
        "CharStorage": np.int8,
        "ByteStorage": np.uint8,
        "BoolStorage": np.bool_,
    }.items()
}


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str


class _View(NamedTuple):
    """A tensor as strides over a storage, all counted in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def extent(self) -> int:
        """Elements from the first to the last that the view touches."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _View:
    shape, strides = tuple(map(int, shape)), tuple(map(int, strides))
    if not isinstance(storage, _Storage) or min((int(offset), *shape, *strides)) < 0:
        raise pickle.UnpicklingError("a tensor is described wrongly")
    return _View(storage, int(offset), shape, strides)


def _rebuild_parameter(view: Any, *_: Any) -> Any:
    return view


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # Fresh wrappers: a pickle may set attributes on what it is given.
        if module == "torch" and name in _STORAGES:
            return _Storage(_STORAGES[name], "")
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *args: _rebuild_tensor(*args)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda *args: _rebuild_parameter(*args)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(
            f"it asks to run {module}.{name}, which rebuilding tensors does not need; "
            "nothing was executed"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _Storage() as kind, str() as key, *_):
                return _Storage(kind.dtype, key)
        raise pickle.UnpicklingError(f"unknown reference {pid!r}")


class TorchFile:
    """Reader of one torch zip file holding a flat mapping of names to tensors."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self._entries = {i.filename: i for i in archive.infolist()}
                pickles = [n for n in self._entries if n.endswith("/data.pkl") or n == "data.pkl"]
                if len(pickles) != 1:
                    raise CheckpointError(f"{path} is a zip archive but not one of torch's")
                self._root = pickles[0].removesuffix("data.pkl")
                self._check_byte_order(archive)
                state = _Unpickler(io.BytesIO(archive.read(pickles[0]))).load()
        except zipfile.BadZipFile as error:
            raise CheckpointError(
                f"{path} is truncated, damaged, or in torch's format of before 1.6: {error}"
            ) from error
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        except CheckpointError:
            raise
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"refusing {path}: {error}") from error
        except Exception as error:  # a damaged pickle can fail in any way
            raise CheckpointError(f"{path} has a damaged data.pkl: {error!r}") from error
        if not isinstance(state, Mapping) or not state:
            raise CheckpointError(f"{path} does not hold a mapping of names to tensors")
        for name, view in state.items():
            self._check(name, view)
        self._views: dict[str, _View] = dict(state)

    def names(self) -> list[str]:
        return list(self._views)

    def info(self, name: str) -> TensorInfo:
        view = self._views[name]
        return TensorInfo(view.shape, view.storage.dtype)

    def where(self, name: str) -> str:
        return str(self.path)

    def read(self, name: str) -> np.ndarray:
        view = self._views[name]
        size = view.storage.dtype.itemsize
        try:
            with (
                zipfile.ZipFile(self.path) as archive,
                archive.open(self._entry(view.storage)) as file,
            ):
                file.seek(view.offset * size)
                raw = file.read(view.extent * size)
        except (OSError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{self.path}: tensor {name!r} is damaged: {error}") from error
        if len(raw) != view.extent * size:
            raise CheckpointError(f"{self.path}: tensor {name!r} is truncated")
        flat = np.frombuffer(raw, view.storage.dtype)
        steps = tuple(step * size for step in view.strides)
        strided = np.lib.stride_tricks.as_strided(flat, view.shape, steps, writeable=False)
        return strided if strided.flags.c_contiguous else strided.copy()

    def _entry(self, storage: _Storage) -> str:
        return f"{self._root}data/{storage.key}"

    def _check(self, name: Any, view: Any) -> None:
        if not isinstance(name, str) or not isinstance(view, _View):
            kind = type(view).__name__
            raise CheckpointError(f"{self.path}: entry {name!r} is no tensor but {kind}")
        entry = self._entries.get(self._entry(view.storage))
        needed = (view.offset + view.extent) * view.storage.dtype.itemsize
        compressed = entry is not None and entry.compress_type != zipfile.ZIP_STORED
        if entry is None or compressed or entry.file_size < needed:
            raise CheckpointError(f"{self.path}: the bytes of tensor {name!r} are not in the file")

    def _check_byte_order(self, archive: zipfile.ZipFile) -> None:
        name = f"{self._root}byteorder"
        if name in self._entries and archive.read(name).decode("latin-1") != sys.byteorder:
            raise CheckpointError(f"{self.path} was written on a machine of other byte order")
