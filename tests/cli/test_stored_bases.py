"""Bases whose weights come out of their files as codes: trained on, asked, and compared or not."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jqlora.cli import main
from jqlora.config import read_config
from jqlora.run import train
from jqlora.train.metrics import read_metrics
from tests.toy_checkpoint import write_model, write_records

pytestmark = pytest.mark.usefixtures("compile_quickly", "keep_programs")

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}


def in_eight_bits(weight):
    """As bitsandbytes has it: the largest magnitude of each row, and 127ths of it."""
    largest = np.abs(weight).max(1)
    codes = np.rint(127 * weight / largest[:, None]).astype(np.int8)
    return {"weight": codes, "SCB": largest, "weight_format": np.zeros((), np.uint8)}


def in_four_bits(weight):
    """As GPTQ has it, each group of 32 inputs with one scale and the zero 8, stored as 7."""
    outputs, inputs = weight.shape
    groups = weight.T.reshape(inputs // 32, 32, outputs)
    scales = np.abs(groups).max(1) / 7
    codes = np.rint(groups / scales[:, None]).reshape(inputs, outputs).astype(np.int64) + 8
    shifts = 4 * np.arange(8)
    words = (codes.reshape(-1, 8, outputs) << shifts[None, :, None]).sum(1)
    zeros = np.full((inputs // 32, outputs // 8), int("7" * 8, 16))
    return {
        "qweight": words.astype(np.uint32).view(np.int32),
        "qzeros": zeros.astype(np.int32),
        "scales": scales.astype(np.float16),
        "g_idx": (np.arange(inputs) // 32).astype(np.int32),
    }


KINDS = {"gptq": (GPTQ, in_four_bits), "int8": (INT8, in_eight_bits)}


@pytest.fixture(params=KINDS)
def base(request, tmp_path):
    config, store = KINDS[request.param]
    folder = write_model(tmp_path / "base", num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        module = name.removesuffix(".weight")
        if module.endswith(PROJECTIONS):
            parts = store(tensors.pop(name))
            tensors |= {f"{module}.{part}": array for part, array in parts.items()}
    save_file(tensors, folder / "model.safetensors")
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"quantization_config": config}))
    return folder


def test_codes_are_trained_on_and_the_adapter_answers_on_them(base, tmp_path, capsys):
    records = write_records(tmp_path / "records.jsonl", 8)
    (tmp_path / "run.yaml").write_text(
        f"model: {{source: {base}, remat: none}}\n"
        "method: {rank: 2, targets: [q_proj, down_proj]}\n"
        f"data: {{train: {records}, length: 64}}\n"
        "train: {steps: 6, batch_size: 2, lr: 1.0e-2, save_every: 0}\n"
        f"output: {{directory: {tmp_path}/run}}\n"
    )
    train(read_config([tmp_path / "run.yaml"]), say=lambda text: None)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert losses[-1] < losses[0]
    words = ["generate", str(base), "--adapter", str(tmp_path / "run" / "adapter")]
    capsys.readouterr()
    assert main([*words, "--prompt", "what is 7?", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parity
def test_what_cannot_be_compared_is_said_before_anything_is_loaded(base, capsys):
    pytest.importorskip("bitsandbytes")
    assert main(["compare", str(base), "--steps", "1"]) == 2
    assert "cannot be compared" in capsys.readouterr().err
