"""The table of limits between kernels, by device."""

from jqlora_kernels import tuning


def test_the_longest_name_that_begins_the_devices_own_decides(monkeypatch):
    entries = {
        name: tuning.Tuning(i, 100, 100, measured=False)
        for i, name in enumerate(["any", "NVIDIA H100", "NVIDIA H100 PCIe"])
    }
    monkeypatch.setattr(tuning, "table", lambda: entries)
    assert tuning.of_device("NVIDIA H100 80GB HBM3") == entries["NVIDIA H100"]
    assert tuning.of_device("NVIDIA H100 PCIe") == entries["NVIDIA H100 PCIe"]
    assert tuning.of_device("cpu") == entries["any"]


def test_every_entry_says_whether_it_was_measured_and_keeps_the_order_of_kernels():
    for entry in tuning.table().values():
        assert entry.measured in (True, False)
        assert 0 <= entry.vector_rows <= entry.fused_rows
