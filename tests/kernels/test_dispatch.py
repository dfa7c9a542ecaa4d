"""Which backend serves, and what is said when none does."""

import logging

import jax
import jax.numpy as jnp
import pytest

from jqlora.quant import choose_backends, empty
from jqlora_kernels import dispatch
from tests.storages import STORAGES


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


ZEROS = "zero points: the kernel decodes"
ODD = "block=96 is no power of two"


@pytest.mark.parametrize(
    ("storage", "inputs", "reason"), [("awq", 128, ZEROS), ("llm.int8", 96, ODD)]
)
def test_what_no_kernel_decodes_goes_to_the_definition_with_the_reason(
    storage, inputs, reason, monkeypatch
):
    q = jax.eval_shape(lambda: empty((inputs, 64), (2,), STORAGES[storage], jnp.bfloat16))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for choice in choose_backends(q, 16, "bfloat16"):
        assert choice.backend == "reference"
        assert choice.refusals["triton"].startswith(reason)
    monkeypatch.setenv("JQLORA_KERNELS", "triton")
    with pytest.raises(NotImplementedError, match=reason):
        choose_backends(q, 16, "bfloat16")
