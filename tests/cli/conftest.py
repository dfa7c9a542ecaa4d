"""One finished run of a toy model, for all the tests that only look at it."""

import pytest

from jqlora.cli import main
from tests.cli.process import start
from tests.toy_checkpoint import write_config


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with a model, records, and ``config.yaml``."""
    folder = tmp_path_factory.mktemp("toy")
    write_config(folder)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where processes find the programs that others have compiled."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def finished(toy, cache):
    """The directory of a completed run of ``toy``'s config."""
    process = start("train", toy / "config.yaml", cache=cache)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    return toy / "run"


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
