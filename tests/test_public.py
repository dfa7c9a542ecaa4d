"""What ``import jqlora as jq`` offers."""

import subprocess
import sys

import pytest

import jqlora as jq


@pytest.mark.parametrize("name", jq.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert getattr(jq, name).__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="lorra"):
        jq.lorra  # noqa: B018


def test_importing_the_package_does_not_import_jax():
    code = "import sys, jqlora; assert not {'jax', 'transformers', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_submodule_hides_a_public_name():
    # a submodule becomes an attribute of its package once anything imports it
    from pathlib import Path

    modules = {path.stem for path in Path(jq.__file__).parent.iterdir()}
    assert modules & set(jq.__all__) == {"data", "optim"}
