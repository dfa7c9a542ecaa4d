"""What a line of results says of the machine."""

import json

import pytest

from jqlora import processor
from jqlora.run.record import record


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("model name\t: Xeon\nflags\t\t: avx512_bf16 amx_bf16", "Xeon, amx_bf16, avx512_bf16"),
        ("model name\t: AMD EPYC\nflags\t\t: fpu avx512f", "AMD EPYC"),
        ("Features\t: fp asimd bf16 svebf16", "aarch64, bf16"),
        ("", "aarch64"),
    ],
)
def test_a_processor_is_named_with_its_instructions_for_bf16(monkeypatch, cpuinfo, name):
    monkeypatch.setattr(processor, "_lines", lambda: cpuinfo.splitlines())
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert processor.name() == name


def test_processors_with_other_instructions_have_other_fingerprints(monkeypatch):
    of = {}
    for flags in ("avx2", "avx2 avx512f"):
        monkeypatch.setattr(
            processor, "_lines", lambda flags=flags: [f"cpu MHz\t: {len(of)}", f"flags\t: {flags}"]
        )
        of[flags] = processor.fingerprint()
        assert of[flags] == processor.fingerprint()
    assert len(set(of.values())) == 2


def test_lines_are_appended_with_their_circumstances(tmp_path):
    for seconds in (1.5, 2.0):
        record(tmp_path / "results.jsonl", {"seconds": seconds}, "numpy")
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["seconds"] for row in rows] == [1.5, 2.0]
    assert rows[0]["processor"] == processor.name()
    assert set(rows[0]["versions"]) == {"jax", "numpy"}
