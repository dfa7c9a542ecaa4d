"""From files to batches: records, templates, tokens with target masks, packing, a resumable order.

records = read_records("train.jsonl")
train, held_out = hold_out(records, 0.1)
examples, report = encode_all(train, tokenizer, max_length=512)
loader = make_loader(examples, length=512, batch_size=8, epochs=3)
"""

from jqlora.data.encode import EncodeReport, encode, encode_all
from jqlora.data.packing import Batch, Rows, pack, pad
from jqlora.data.pipeline import Loader, make_loader
from jqlora.data.questions import answer, question, says
from jqlora.data.records import Message, Record, parse_record
from jqlora.data.sources import read_records
from jqlora.data.split import hold_out, shared_questions
from jqlora.data.template import Template
from jqlora.data.tokenize import Example, encode_prompt

__all__ = [
    "Batch",
    "EncodeReport",
    "Example",
    "Loader",
    "Message",
    "Record",
    "Rows",
    "Template",
    "answer",
    "encode",
    "encode_all",
    "encode_prompt",
    "hold_out",
    "make_loader",
    "pack",
    "pad",
    "parse_record",
    "question",
    "read_records",
    "says",
    "shared_questions",
]
