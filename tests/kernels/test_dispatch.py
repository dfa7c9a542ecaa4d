"""Which backend serves, and what is said when none does."""

import logging

import jax
import pytest

from jqlora_kernels import dispatch


def refuse(reason):
    def backend():
        raise NotImplementedError(reason)

    return backend


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


BACKENDS = {"triton": lambda: "triton", "reference": lambda: "reference"}


def test_a_cpu_takes_the_reference():
    assert dispatch.run("op", BACKENDS, None) == "reference"


@pytest.mark.usefixtures("on_gpu")
def test_a_gpu_takes_the_kernel():
    assert dispatch.run("op", BACKENDS, None) == "triton"


@pytest.mark.usefixtures("on_gpu")
def test_a_refused_kernel_gives_way_to_the_reference_and_the_log_says_why(caplog):
    with caplog.at_level(logging.DEBUG, logger=dispatch.__name__):
        result = dispatch.run("op", BACKENDS | {"triton": refuse("K=7")}, None)
    assert result == "reference"
    assert "triton refused: K=7" in caplog.text


@pytest.mark.usefixtures("on_gpu")
def test_all_refusals_are_told_together():
    backends = {"triton": refuse("too wide"), "reference": refuse("too deep")}
    with pytest.raises(ExceptionGroup, match="op") as raised:
        dispatch.run("op", backends, None)
    assert [str(refusal) for refusal in raised.value.exceptions] == ["too wide", "too deep"]


def test_an_argument_goes_before_the_environment_before_the_platform(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    assert dispatch.run("op", BACKENDS, None) == "triton"
    assert dispatch.run("op", BACKENDS, "reference") == "reference"


def test_a_backend_asked_for_by_name_is_never_replaced():
    with pytest.raises(NotImplementedError, match="K=7"):
        dispatch.run("op", BACKENDS | {"triton": refuse("K=7")}, "triton")


def test_an_unknown_backend_is_refused_with_those_there_are(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "cutlass")
    with pytest.raises(ValueError, match=r"JQLORA_KERNELS=cutlass.*triton, reference"):
        dispatch.run("op", BACKENDS, None)
