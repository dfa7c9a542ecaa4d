"""The benchmark runs to its end where there is no GPU, so that its first run on one can too."""

import importlib
import json
import math

import jax
import jax.numpy as jnp
import pytest

from jqlora_kernels.bench import cases, report, timing

bench = importlib.import_module("jqlora_kernels.bench.__main__")

pytestmark = [
    pytest.mark.usefixtures("compile_quickly"),
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
    pytest.mark.skipif(jax.default_backend() != "cpu", reason="emulates a GPU on a CPU"),
]
ROW = {
    "case": str,
    "operation": str,
    "layer": str,
    "K": int,
    "N": int,
    "rows": int,
    "contender": str,
    "double_quant": bool,
    "refused": (str, type(None)),
    "failed": (str, type(None)),
    "error": (float, type(None)),
    "wrong": bool,
    "seconds": (dict, type(None)),
    "ratio": (float, type(None)),
}
CONTENT = {
    "format": int,
    "device": str,
    "platform": str,
    "interpreted": bool,
    "python": str,
    "versions": dict,
    "commit": (str, type(None)),
    "changed_files": bool,
    "date": str,
    "rounds": int,
    "rows": list,
}


def test_a_tiny_run_writes_every_contender_with_a_time_or_a_reason(tmp_path, capsys):
    assert bench.main(["--tiny", "--rounds", "2", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "cpu.json").read_text())
    for key, kind in CONTENT.items():
        assert isinstance(content[key], kind), key
    assert content["interpreted"] is True
    assert content["tuning"] is None, "emulated times must not become a table"
    assert content["versions"]["jax"] == jax.__version__
    for row in content["rows"]:
        for key, kind in ROW.items():
            assert isinstance(row[key], kind), (key, row)
        assert not row["wrong"]
        assert row["failed"] is None, row
        assert (row["seconds"] is None) == bool(row["refused"]), row
        if row["seconds"]:
            assert 0 < row["seconds"]["least"] <= row["seconds"]["median"] <= row["seconds"]["most"]
            assert row["seconds"]["rounds"] == 2
    ran = {(row["operation"], row["contender"]) for row in content["rows"] if row["seconds"]}
    kernels = ("vector", "fused", "decode+gemm")
    assert {(o, f"triton {k}") for o in ("forward", "gradient") for k in kernels} <= ran
    assert {("decode", "copy"), ("decode", "reference"), ("forward", "bf16")} <= ran
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cpu.json", "cpu.png"]
    assert "[4/4]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--tiny emulates"),
        (["--tiny", "--write-tuning"], "needs a GPU"),
        (["--tiny", "--only", "falcon"], "no case matches"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_timed(arguments, said, capsys):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert said in capsys.readouterr().err


def test_a_loop_makes_every_call_it_says_and_none_is_moved_out():
    weights = [jnp.full((4, 4), 2.0), jnp.full((4, 4), 3.0)]
    seen = []

    def call(x, weight):
        jax.debug.callback(lambda v: seen.append(float(v)), weight[0, 0])
        return x @ weight

    contender = timing.looped("twice", call, jnp.ones((4, 4)), weights, turns=3)
    jax.effects_barrier()
    assert contender.calls == 6
    assert sorted(seen) == [2.0] * 3 + [3.0] * 3
    times = timing.race([contender], rounds=4)["twice"]
    assert times.rounds == 4


@pytest.mark.parametrize(("case", "layers"), [((128, 128), 16), ((14336, 4096), 5)])
def test_weights_outnumber_the_cache_but_not_the_memory(case, layers):
    stored = cases.Case("forward", "x", *case, rows=1).stored_bytes
    assert timing.layers_for(stored) == layers


def test_bytes_of_a_case_are_those_of_4_127_bits_a_parameter():
    case = cases.Case("decode", "x", 4096, 4096, 0)
    assert round(8 * case.stored_bytes / 4096**2, 3) == 4.127
    operands = cases.stored_matrix(case, 0)
    leaves = jax.tree.leaves((operands[:2], operands[3][0]))
    assert sum(a.nbytes for a in leaves) == case.stored_bytes


def timings(**seconds):
    """Rows of the report from {contender: seconds by rows of x}."""
    return [
        {
            "operation": "forward",
            "contender": name.replace("_", " ").replace("and", "+"),
            "rows": 4**i,
            "seconds": {"median": median} if math.isfinite(median) else None,
        }
        for name, medians in seconds.items()
        for i, median in enumerate(medians)
    ]


def test_limits_lie_where_the_next_kernel_becomes_faster():
    rows = timings(
        triton_vector=[1, 2, 9, 40],
        triton_fused=[2, 3, 4, 9],
        triton_decodeandgemm=[5, 5, 5, 6],
        mosaic=[1, 1, 7, 9],
        mosaic_decodeandgemm=[5, 5, 5, 6],
        bf16=[0.1, 0.1, 0.1, 0.1],
    )
    limits = {"vector_rows": 4, "fused_rows": 16, "hopper_rows": 4, "measured": True}
    assert report.tuning_entry(rows) == limits


def test_a_kernel_that_never_wins_gets_no_rows():
    rows = timings(triton_vector=[9, 9], triton_fused=[8, 8], triton_decodeandgemm=[5, 5])
    limits = {"vector_rows": 0, "fused_rows": 0, "hopper_rows": 0, "measured": True}
    assert report.tuning_entry(rows) == limits
    assert report.tuning_entry([]) is None
