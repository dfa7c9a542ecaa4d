"""What is given up so that a step fits: the cheapest first, and nothing in vain."""

import dataclasses

import pytest

from jqlora.config import read_config
from jqlora.run import fitting
from jqlora.run.memory import RESERVED, Memory
from jqlora_kernels.aot_targets import TARGETS

MIB = 2**20
SETTINGS = {
    "model": {"source": "somewhere", "remat": "none"},
    "method": {"name": "lora", "rank": 16},
    "data": {"train": "somewhere", "length": 512},
    "train": {"steps": 10, "batch_size": 6},
    "output": {"directory": "somewhere"},
}


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(str(SETTINGS))
    return read_config([file])


def pretended(config, _):
    """Bytes that follow from the settings alone, each saving some."""
    train, model = config.train, config.model
    rows = train.batch_size // train.accumulate
    base = 300 if model.quantize is None else 100
    moments = 2 * config.method.rank * (0.25 if "8bit" in train.optimizer else 1)
    host = moments if train.offload == "all" else 0
    kept = rows * config.data.length // {"full": 4, "offload": 8}.get(model.remat, 1) / 16
    peak = base + config.method.rank + moments - host + kept
    sizes = [base if model.quantize else 0, 0, base, config.method.rank, moments, 0, kept, peak]
    return Memory(*(int(size * MIB) for size in sizes), host=int(host * MIB), scoreless=True)


def fitted(config, room, monkeypatch, write=None):
    """(exit status, what was said) for a device with ``room`` MiB."""
    monkeypatch.setattr(fitting, "step_memory", pretended)
    target = dataclasses.replace(TARGETS["a100"], memory=RESERVED + room * MIB)
    said = []
    status = fitting.fit_into(config, target, say=said.append, write=write)
    return status, said


@pytest.mark.parametrize(
    ("room", "changed"),
    [
        (550, []),
        (400, ["model.remat"]),
        (360, ["model.remat", "train.accumulate"]),
        (200, ["model.remat", "model.quantize"]),
    ],
)
def test_the_cheapest_changes_are_tried_first(config, room, changed, monkeypatch):
    status, said = fitted(config, room, monkeypatch)
    assert status == 0
    lines = said[said.index("fits with") + 1 :] if changed else []
    kept = [line.split("=")[0].strip() for line in lines if "=" in line.split(":")[0]]
    assert kept == changed


def test_no_change_is_made_that_it_fits_without(config, monkeypatch):
    monkeypatch.setattr(fitting, "step_memory", pretended)
    for room in range(90, 560, 20):
        target = dataclasses.replace(TARGETS["a100"], memory=RESERVED + room * MIB)
        first = pretended(config, target)
        if first.fits(target):
            continue
        changes, found = fitting.search(config, target, first, lambda _: None)
        if not found.fits(target):
            continue
        for left_out in changes:
            without = config
            for change in changes:
                without = without if change is left_out else change.made_in(without)
            last = left_out is changes[-1]
            assert last or not pretended(without, target).fits(target), (room, left_out)


def test_what_fits_is_written_and_read_again(config, monkeypatch, tmp_path):
    status, _ = fitted(config, 150, monkeypatch, write=tmp_path / "fits.yaml")
    assert status == 0
    again = read_config([tmp_path / "fits.yaml"])
    assert again != config
    assert again.model.quantize is not None
    assert pretended(again, None).peak <= 150 * MIB


def test_where_nothing_fits_nothing_is_written(config, monkeypatch, tmp_path):
    status, said = fitted(config, 10, monkeypatch, write=tmp_path / "fits.yaml")
    assert status == 1
    assert "smaller model" in said[-1]
    assert not (tmp_path / "fits.yaml").exists()


def test_it_says_where_four_bits_save_nothing(config, monkeypatch):
    change = fitting.Change("model.quantize", fitting.QuantizeConfig(), "")
    quantized = change.made_in(config)

    def dearer(config, target):
        memory = pretended(config, target)
        extra = 250 * MIB if config.model.quantize else 0
        return dataclasses.replace(
            memory, temporaries=memory.temporaries + extra, peak=memory.peak + extra
        )

    monkeypatch.setattr(fitting, "step_memory", dearer)
    said = []
    assert fitting.fit_into(quantized, TARGETS["a100"], say=said.append) == 0
    assert any("saves nothing over LoRA" in line for line in said)
