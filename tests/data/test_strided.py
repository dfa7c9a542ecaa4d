"""Windows over whole documents: every token once, with its context."""

import numpy as np
import pytest

from jqlora.data.strided import Document, read_documents, strided
from jqlora.errors import DataError
from tests.data.toy_tokenizers import byte_tokenizer

TEXT = "It was the best of times, it was the worst of times."


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(("length", "stride"), [(16, 4), (16, 15), (20, 7), (60, 30)])
def test_every_token_but_the_first_is_a_target_once_with_its_context(length, stride, bos):
    windows = strided(Document(TEXT, "a"), byte_tokenizer(bos=bos), length=length, stride=stride)
    size = len(TEXT) + bos
    seen = np.zeros(size, int)
    for number, window in enumerate(windows):
        begin = number * stride
        seen[begin : begin + len(window)] += window.loss_mask
        context = np.flatnonzero(window.loss_mask)[0]
        assert len(window) <= length
        assert context >= (length - stride if number else 1)
    assert seen[0] == 0
    assert (seen[1:] == 1).all()
    assert begin + len(windows[-1]) == size


def test_a_text_file_is_one_document_and_records_are_their_own(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"text": "four"}\n')
    found = read_documents([tmp_path / "a.txt", tmp_path / "b.jsonl"])
    assert [document.text for document in found] == ["one\n\ntwo\n", "three", "four"]
    (tmp_path / "c.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match=r"c\.jsonl:1: perplexity of documents is that of plain"):
        read_documents(tmp_path / "c.jsonl")


@pytest.mark.parametrize("stride", [0, 16])
def test_a_stride_without_context_is_refused(stride):
    with pytest.raises(DataError, match="between 1 and 15"):
        strided(Document(TEXT, "a"), byte_tokenizer(), length=16, stride=stride)
