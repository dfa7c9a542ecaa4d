"""The memory of a step, compiled for a GPU that is not there, and the command that tells it."""

import dataclasses

import pytest

from jqlora.cli import main
from jqlora.config import read_config
from jqlora.errors import ConfigError
from jqlora.run import plan_run
from jqlora.run.memory import RESERVED, compile_step, on_gpu
from jqlora_kernels import aot
from jqlora_kernels.aot_targets import TARGETS
from tests.toy_checkpoint import write_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
]
compiles = [
    pytest.mark.aot,
    pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing())),
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planned")
    # one shape of matrices, so that few kernels are compiled
    model = write_model(
        folder / "model", hidden_size=128, intermediate_size=128, num_key_value_heads=4
    )
    for weights in model.glob("*.safetensors"):
        weights.unlink()  # the config alone will do
    path = folder / "config.yaml"
    path.write_text(
        f"model: {{source: {model}, quantize: {{}}, remat: full}}\n"
        "method: {name: lora, rank: 4}\n"
        "data: {train: nowhere.jsonl, length: 128}\n"
        "train: {steps: 2, batch_size: 2, offload: none}\n"
        f"output: {{directory: {folder / 'out'}}}\n"
    )
    return path


@pytest.fixture(scope="module")
def memory(file):
    return compile_step(read_config([file]), TARGETS["h100"])


@pytest.mark.parametrize("_", [pytest.param(0, marks=compiles)])
def test_the_parts_are_the_plans_and_the_peak_is_their_sum(_, file, memory):
    sizes = plan_run(on_gpu(read_config([file])), weightless=True)
    assert memory.codes + memory.scales == sizes.base.quantized_bytes
    assert memory.unquantized == sizes.base.other_bytes
    assert memory.adapters == sizes.adapter_bytes
    assert memory.host == 0
    held = memory.codes + memory.scales + memory.unquantized + memory.adapters + memory.optimizer
    assert 0 <= memory.peak - held - memory.batch - memory.temporaries < 2**14


@pytest.mark.parametrize("_", [pytest.param(0, marks=compiles)])
def test_the_command_prints_the_table_and_finds_what_fits(_, file, memory, tmp_path, capsys):
    room = RESERVED + memory.peak - 2**12  # just too little
    written = tmp_path / "fits.yaml"
    words = ["plan", str(file), "--device", "h100", "--memory", f"{room / 2**20}MiB"]
    assert main([*words, "--write", str(written)]) == 0
    said = capsys.readouterr().out
    assert "base, codes" in said
    assert "does not fit" in said
    assert "kernels    triton: 256 rows times" in said
    config = read_config([written])
    assert config != read_config([file])
    fits = compile_step(config, TARGETS["h100"])
    assert fits.fits(dataclasses.replace(TARGETS["h100"], memory=int(room)))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--device", "h1000"], "known are h100"),
        (["--memory", "24"], "such as 24GB"),
        (["--write", "x.yaml"], "--device or --memory"),
    ],
)
def test_what_cannot_be_meant_is_refused(words, told, file, monkeypatch, capsys):
    monkeypatch.setattr(aot, "missing", lambda: None)
    assert main(["plan", str(file), *words]) != 0
    assert told in capsys.readouterr().err


def test_without_the_compiler_it_says_what_to_install(file, monkeypatch, capsys):
    monkeypatch.setattr(aot, "missing", lambda: "there is no ptxas: pip install 'jqlora[aot]'")
    assert main(["plan", str(file), "--device", "l4"]) != 0
    assert "jqlora[aot]" in capsys.readouterr().err


def test_a_task_is_not_compiled_for_a_device(file):
    config = read_config([file], ["data.task=sst2", "data.packing=false"])
    with pytest.raises(ConfigError, match="only a step on text"):
        compile_step(config, TARGETS["h100"])
