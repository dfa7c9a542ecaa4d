"""What a model is for: the head on its base, and what each is called elsewhere."""

from jqlora.types import Params

TASKS = (
    "causal-lm",
    "masked-lm",
    "sequence-classification",
    "token-classification",
    "question-answering",
    "seq2seq-lm",
)
GENERATING = ("causal-lm", "seq2seq-lm")
"""Tasks whose models write text, token by token."""
LABELLED = ("sequence-classification", "token-classification")
"""Tasks whose head has as many outputs as there are labels."""
_TRAINED_WHOLE = {
    "sequence-classification": "classifier",
    "token-classification": "classifier",
    "question-answering": "qa_outputs",
}


def trained_whole(task: str, params: Params) -> tuple[str, ...]:
    """The heads of a model with these (abstract) parameters that PEFT trains whole beside every
    adapter of the task. It knows them by name: not ``classification_head``, which BART and T5 have,
    and which is trained whole where ``modules_to_save`` says so."""
    name = _TRAINED_WHOLE.get(task)
    return (name,) if name is not None and name in params else ()
