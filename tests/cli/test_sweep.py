"""``jqlora sweep``: members of one program, each as its own run, interrupted and resumed."""

import csv
import json
import os
import signal

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jqlora as jq
from jqlora.cli import main
from jqlora.cli.generate import assigned
from jqlora.train.joint_batches import JointBatches
from jqlora.train.metrics import WALL_CLOCK, read_metrics
from tests.toy_checkpoint import STEPS
from tests.train.compilations import compilations

pytestmark = pytest.mark.usefixtures("compile_quickly")

TOLERANCE = 2e-4
"""Of the largest number of a tensor, after STEPS updates of Adam in another order of additions."""
NAMES = {"two": 2, "four": 4}
SAME = "rank-4"
"""The member with the settings of the run ``finished``."""


@pytest.fixture(scope="module")
def swept(toy, tmp_path_factory):
    """The directory of a sweep of two ranks that was interrupted in the middle."""
    folder = tmp_path_factory.mktemp("sweep") / "run"
    fetch, fetched = JointBatches.__next__, []

    def interrupted(self):
        fetched.append(1)
        if len(fetched) == STEPS // 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return fetch(self)

    words = ["sweep", str(toy / "config.yaml"), f"output.directory={folder}", "train.save_every=0"]
    words += ["data.general=null", "sample.prompts=[]", "--vary", "method.rank=2,4"]
    with compilations() as compiled:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(JointBatches, "__next__", interrupted)
            assert main(words) == 128 + signal.SIGTERM
        assert not (folder / "summary.json").exists()
        assert main(["resume", str(folder)]) == 0
    assert not compiled  # but by a thread, as the base was loaded
    return folder


def test_a_member_is_what_its_own_run_gives(swept, finished):
    both = swept / "members" / SAME, finished
    ours, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in both)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[name], tensor, atol=TOLERANCE * np.abs(tensor).max())
    ours, theirs = ((run / "adapter" / "adapter_config.json").read_text() for run in both)
    assert json.loads(ours) == json.loads(theirs)
    ours, theirs = (read_metrics(run / "metrics.jsonl") for run in both)
    theirs = [row for row in theirs if row["kind"] != "general"]
    for row, own in zip(ours, theirs, strict=True):
        assert row.keys() == own.keys()
        assert row["kind"] == own["kind"]
        for name in row.keys() - WALL_CLOCK - {"kind"}:
            np.testing.assert_allclose(row[name], own[name], rtol=1e-4, err_msg=name)
    assert (both[0] / "report.html").exists()


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_the_adapter_of_a_member_is_one_that_peft_loads(swept, toy):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(toy / "model", dtype=torch.float32)
    ids = np.arange(9)[None]
    ours, params = jq.load(toy / "model", dtype="float32")
    for rank in NAMES.values():
        folder = swept / "members" / f"rank-{rank}" / "adapter"
        theirs = peft.PeftModel.from_pretrained(base, folder).eval()
        plan, adapters = jq.load_adapter(folder, ours, params)
        apply = jax.jit(jq.bind(ours, plan))
        found = apply({"params": params, **adapters}, ids.astype(np.int32)).logits
        with torch.no_grad():
            expected = theirs(torch.tensor(ids)).logits.numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.ptp(expected))
        base = theirs.unload()


def test_members_are_compared_and_the_best_is_named(swept):
    summary = json.loads((swept / "summary.json").read_text())
    losses = [member["losses"]["heldout"] for member in summary["members"]]
    assert losses == sorted(losses)
    assert summary["best"] == summary["members"][0]["name"]
    assert summary["ranked_by"] == "heldout"
    header, *rows = csv.reader((swept / "results.csv").read_text().splitlines())
    assert header == ["member", "method.rank", "heldout loss", "training loss", "parameters"]
    assert {row[0]: row[1] for row in rows} == {"rank-2": "2", "rank-4": "4"}
    page = (swept / "report.html").read_text()
    assert f"<strong>{summary['best']}</strong>" in page
    assert page.count("data:image/png;base64,") == 2


def test_answers_come_from_the_adapters_that_are_named(swept, toy, capsys):
    words = ["generate", str(toy / "model"), "--max-new-tokens", "3", "--prompt", "what is 7?"]
    two = [f"--adapter={name}={swept}/members/rank-{rank}/adapter" for name, rank in NAMES.items()]
    assert main([*words, *two, "--prompt", "and 8?", "--adapter-names", "four,base"]) == 0
    lines = capsys.readouterr().out.splitlines()
    headers = [line for line in lines if line.startswith("[")]
    assert headers == ["[four] what is 7?", "[base] and 8?"]


def test_without_names_every_adapter_answers_every_prompt():
    rows = assigned(["x", "y"], ["two", "four"], None)
    assert rows == [("x", 0), ("x", 1), ("y", 0), ("y", 1)]
    assert assigned(["x"], [], None) == [("x", -1)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adapter", "x=a", "--adapter", "x=b"], "'x' is taken"),
        (["--adapter", "base=a"], "'base' is taken"),
        (["--adapter", "x=a", "--adapter-names", "x,x"], "2 names for 1 prompts"),
        (["--adapter", "x=a", "--adapter-names", "y"], "'y' is none of x, base"),
    ],
)
def test_names_that_do_not_fit_are_one_line(words, message, complain):
    assert message in complain("generate", "nowhere", "--prompt", "hello", *words)


def test_what_cannot_vary_is_one_line(toy, complain):
    line = complain("sweep", toy / "config.yaml", "--vary", "data.length=32,64")
    assert "data.length cannot differ" in line
    assert "train.lr" in line
