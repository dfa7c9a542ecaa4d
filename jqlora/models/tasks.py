"""What a model is for: the head on its base, and what each is called elsewhere."""

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
TRAINED_WHOLE = {
    "sequence-classification": ("classifier",),
    "token-classification": ("classifier",),
    "question-answering": ("qa_outputs",),
}
"""Heads that PEFT trains whole beside every adapter of such a task."""
