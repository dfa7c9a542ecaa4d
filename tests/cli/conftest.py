"""One finished run of a toy model, for all the tests that only look at it."""

import fcntl
import os

import pytest

from jqlora.cli import main
from tests.cli.process import start
from tests.toy_checkpoint import write_config


@pytest.fixture(scope="session")
def common(tmp_path_factory):
    """A folder that is the same in all processes of this session of tests."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def made_once(folder, make):
    """``folder``, made by the first process that asks; others wait for it."""
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            make(folder)
    return folder


@pytest.fixture(scope="session")
def toy(common):
    """A folder with a model, records, and ``config.yaml``."""

    def make(folder):
        folder.mkdir()
        write_config(folder)

    return made_once(common / "toy", make)


@pytest.fixture(scope="session")
def cache(common):
    """Where processes find the programs that others have compiled."""
    return made_once(common / "cache", lambda folder: folder.mkdir())


@pytest.fixture(scope="session")
def finished(toy, cache):
    """The directory of a completed run of ``toy``'s config; ``compiled.log`` beside it is what JAX
    said meanwhile."""

    def train(_):
        process = start("train", toy / "config.yaml", cache=cache, JAX_LOG_COMPILES="1")
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors
        (toy / "compiled.log").write_text(errors)

    return made_once(toy / "run", train)


@pytest.fixture
def complain(capsys):
    """Run a command that must fail with one line on stderr and status 2; returns the line."""

    def run(*argv):
        capsys.readouterr()
        assert main([str(word) for word in argv]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        lines = [line for line in err.splitlines() if line.startswith("jqlora: ")]
        assert len(lines) == 1
        assert "Traceback" not in err
        return lines[0]

    return run
