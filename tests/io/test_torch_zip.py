"""``pytorch_model.bin`` is read as torch reads it, and never executed."""

import os
import pickle
import zipfile

import numpy as np
import pytest

from jqlora.errors import CheckpointError
from jqlora.io.readers import open_directory
from jqlora.io.readers.torch_zip import TorchFile


def as_archive(path, content, **members):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)
    return path


class Call:
    """Pickles to a call of ``function``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


HARMFUL = {
    "a shell command": (os.system, "touch {witness}", "posix.system"),
    "a built-in": (eval, "open({witness!r}, 'w')", "eval"),
    "an import": (__import__, "this", "__import__"),
}


@pytest.mark.parametrize("kind", HARMFUL)
def test_a_pickle_that_calls_something_is_refused_and_nothing_runs(tmp_path, kind):
    function, argument, name = HARMFUL[kind]
    witness = tmp_path / "witness"
    call = Call(function, argument.format(witness=str(witness)))
    path = as_archive(tmp_path / "pytorch_model.bin", pickle.dumps({"w": call}, protocol=2))
    with pytest.raises(CheckpointError, match=f"refusing .*{name}.*nothing was executed"):
        open_directory(tmp_path)
    assert path.exists()
    assert not witness.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a pickle", r"refusing|damaged data\.pkl"),
        (pickle.dumps([1, 2]), "does not hold a mapping"),
        (pickle.dumps({}), "does not hold a mapping"),
        (pickle.dumps({"step": 3}), "entry 'step' is no tensor but int"),
        (b"\x80\x02Pwhat\n.", r"damaged data\.pkl|refusing"),
    ],
)
def test_a_pickle_that_holds_no_tensors_is_named(tmp_path, content, message):
    path = as_archive(tmp_path / "x.bin", content)
    with pytest.raises(CheckpointError, match=message):
        TorchFile(path)


def test_other_files_are_named(tmp_path):
    (tmp_path / "old.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match=r"format of before 1\.6"):
        TorchFile(tmp_path / "old.bin")
    with zipfile.ZipFile(tmp_path / "zip.bin", "w") as archive:
        archive.writestr("readme", "")
    with pytest.raises(CheckpointError, match="not one of torch's"):
        TorchFile(tmp_path / "zip.bin")
    path = as_archive(tmp_path / "big.bin", pickle.dumps({}), byteorder="big")
    with pytest.raises(CheckpointError, match="other byte order"):
        TorchFile(path)
    with pytest.raises(CheckpointError, match="cannot read"):
        TorchFile(tmp_path / "absent.bin")


@pytest.mark.parity
def test_every_tensor_is_read_as_torch_saved_it(tmp_path):
    torch = pytest.importorskip("torch")
    whole = torch.arange(60, dtype=torch.float32).reshape(10, 6)
    tensors = {
        "whole": whole,
        "transposed": whole.T,
        "slice": whole[2:5, 1:3],
        "expanded": whole[:1].expand(4, 6),
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        **{
            str(dtype): torch.arange(5).to(dtype)
            for dtype in (torch.float64, torch.float16, torch.uint8, torch.bool, torch.int8)
        },
    }
    bf16 = torch.randn(7).bfloat16()
    torch.save({**tensors, "bf16": bf16}, tmp_path / "x.bin")
    reader = TorchFile(tmp_path / "x.bin")
    assert reader.names() == [*tensors, "bf16"]
    for name, tensor in tensors.items():
        expected = tensor.detach().numpy()
        got = reader.read(name)
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert reader.info(name) == (expected.shape, expected.dtype)
        np.testing.assert_array_equal(got, expected)
    assert reader.read("bf16").view(np.int16).tolist() == bf16.view(torch.int16).tolist()


@pytest.mark.parity
def test_a_module_state_and_shared_storage_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    torch.save(module.state_dict(), tmp_path / "x.bin")
    reader = TorchFile(tmp_path / "x.bin")
    for name, tensor in module.state_dict().items():
        np.testing.assert_array_equal(reader.read(name), tensor.numpy())


@pytest.mark.parity
def test_a_truncated_or_damaged_archive_is_named(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"weight": torch.arange(1000.0)}, tmp_path / "x.bin")
    raw = bytearray((tmp_path / "x.bin").read_bytes())
    (tmp_path / "short.bin").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(CheckpointError, match=r"short\.bin is truncated"):
        TorchFile(tmp_path / "short.bin")
    at = bytes(raw).index(np.float32(500.0).tobytes())
    raw[at] ^= 0xFF
    (tmp_path / "flipped.bin").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"flipped\.bin: tensor 'weight' is damaged"):
        TorchFile(tmp_path / "flipped.bin").read("weight")
