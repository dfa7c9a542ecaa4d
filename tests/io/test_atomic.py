"""Files and directories appear wholly or not at all."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from jqlora.errors import SaveError
from jqlora.io import atomic


def test_a_file_is_written_with_its_folder_and_replaced(tmp_path):
    path = tmp_path / "a" / "b.json"
    atomic.atomic_write_json(path, {"x": 1})
    atomic.atomic_write_json(path, {"x": 2})
    assert path.read_text() == '{\n  "x": 2\n}\n'
    assert os.listdir(path.parent) == ["b.json"]


def test_a_full_disk_leaves_the_earlier_file_and_says_so(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    atomic.atomic_write_text(path, "earlier")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(SaveError, match=r"cannot write .*metrics.json: No space left on device"):
        atomic.atomic_write_text(path, "later")
    assert path.read_text() == "earlier"
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match=r"cannot write .*file/x"):
        atomic.atomic_write_text(tmp_path / "file" / "x", "")
    with pytest.raises(SaveError, match="is a file"), atomic.atomic_directory(tmp_path / "file"):
        pass


def test_a_directory_replaces_the_earlier_one_wholly(tmp_path):
    target = tmp_path / "model"
    for name in ("one.safetensors", "two.safetensors"):
        with atomic.atomic_directory(target) as folder:
            (folder / name).write_text(name)
    assert [p.name for p in target.iterdir()] == ["two.safetensors"]
    assert os.listdir(tmp_path) == ["model"]


def test_an_error_inside_leaves_the_earlier_directory(tmp_path):
    target = tmp_path / "model"
    with atomic.atomic_directory(target) as folder:
        (folder / "config.json").write_text("earlier")
    with pytest.raises(ZeroDivisionError), atomic.atomic_directory(target) as folder:
        (folder / "config.json").write_text(str(1 // 0))
    with pytest.raises(SaveError, match="No space left"), atomic.atomic_directory(target):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (target / "config.json").read_text() == "earlier"
    assert os.listdir(tmp_path) == ["model"]


def test_a_directory_with_foreign_files_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SaveError, match=r"thesis\.tex"), atomic.atomic_directory(tmp_path):
        pass
    assert (tmp_path / "thesis.tex").exists()


def test_a_save_killed_between_the_renames_is_taken_back_by_the_next(tmp_path):
    previous = tmp_path / ".model.previous"
    previous.mkdir()
    (previous / "config.json").write_text("earlier")
    with pytest.raises(ZeroDivisionError), atomic.atomic_directory(tmp_path / "model"):
        raise ZeroDivisionError
    assert (tmp_path / "model" / "config.json").read_text() == "earlier"


def test_a_killed_save_leaves_the_earlier_directory(tmp_path):
    target = tmp_path / "model"
    with atomic.atomic_directory(target) as folder:
        (folder / "config.json").write_text("earlier")
    script = (
        "import os, signal, sys\n"
        "from jqlora.io.atomic import atomic_directory\n"
        "with atomic_directory(sys.argv[1]) as folder:\n"
        "    (folder / 'config.json').write_text('later')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (target / "config.json").read_text() == "earlier"
