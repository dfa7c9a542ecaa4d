"""Adapters with heads, trained by PEFT, folded file by file into what transformers loads."""

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import numpy as np  # noqa: E402

from jqlora.errors import MergeError  # noqa: E402
from jqlora.io.merge_files import merge_checkpoint  # noqa: E402
from tests.models import encoders  # noqa: E402
from tests.models.encoders import MASKED, SEQUENCE, TOKENS  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("compile_quickly"),
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),
]
# what the checkpoint was made for, and what the adapter was trained for
HEADS = {
    "new head": ("roberta", MASKED, SEQUENCE, ["classifier"]),
    "another size": ("roberta", SEQUENCE, SEQUENCE, ["classifier"]),
    "new head for tokens": ("deberta_v3", MASKED, TOKENS, ["classifier"]),
    "own head": ("deberta_v2", SEQUENCE, SEQUENCE, ["classifier", "pooler"]),
    "pooler and head": ("bert", MASKED, SEQUENCE, ["classifier", "pooler"]),
}
WORDS = {SEQUENCE: "SEQ_CLS", TOKENS: "TOKEN_CLS"}


def trained_by_peft(folder, base, made_for, task, saved, labels):
    """A base and an adapter in ``folder``; returns PEFT's model, its head and adapter at random."""
    encoders.checkpoint(base, made_for).hf.save_pretrained(folder / "base")
    model = getattr(transformers, encoders.AUTO[task]).from_pretrained(
        folder / "base", num_labels=labels, ignore_mismatched_sizes=True
    )
    config = peft.LoraConfig(
        task_type=WORDS[task], r=2, target_modules=["query", "query_proj"], modules_to_save=saved
    )
    model = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3, generator=generator)
    model.save_pretrained(folder / "adapter")
    return model


def logits_of(model, encoder):
    return encoders.logits_of(encoders.run_theirs(encoder._replace(hf=model), batch(encoder)))


def batch(encoder):
    return encoders.batch(encoder)


@pytest.mark.parametrize("kind", HEADS)
def test_transformers_loads_the_merged_model_with_its_head_and_equal_logits(kind, tmp_path):
    base, made_for, task, saved = HEADS[kind]
    labels = encoders.LABELS if kind == "own head" else 5
    theirs = trained_by_peft(tmp_path, base, made_for, task, saved, labels)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged, report = getattr(transformers, encoders.AUTO[task]).from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not any(report.values()), report
    assert merged.config.architectures == [type(merged).__name__]
    assert merged.config.num_labels == labels
    encoder = encoders.checkpoint(base, made_for)
    expected, got = (logits_of(model, encoder) for model in (theirs, merged.eval()))
    assert got.shape[-1] == labels
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def test_a_head_that_nothing_has_whole_is_named(tmp_path):
    trained_by_peft(tmp_path, "bert", MASKED, SEQUENCE, ["classifier"], 5)
    with pytest.raises(MergeError, match=r"has no bert\.pooler\.dense\.bias, bert\.pooler\.dense"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
