"""What may differ, decided once: nothing on the command line widens it.

**fp32.** Both sides compute the same function in another order of additions, so they differ by
rounding, which is 6e-8 an operation and grows with the depth of the model and with the steps of
training. A hundred and more such roundings fit into 1e-5. A real defect (a mask, an epsilon, a
position that is off by one) shows as 1e-3 and above. A gradient is a sum of products of states
that each carry such an error, and AdamW divides by its size, so gradients and trained adapters have
ten times as much. Errors are relative: of states and logits to their range, of losses to their
value, of each leaf of the gradient to its largest entry, of the trained adapter to its root mean
square. Where a budget is exceeded, either side may be the one that is off (over a vocabulary of
49,152 it is torch: its ``log_softmax`` on a CPU is wrong by 1e-5, and with it every gradient). So
transformers and PEFT are then run in fp64 as well, and ours is held to that: within the same
budgets, or, where fp32 itself does no better, no further away than twice what theirs is.

**bf16.** A rounding is 4e-3, two computations that are both right differ by much more than that
after some layers, and by how much depends on the checkpoint: no fixed number is both safe and
sharp. So each side is held to the exact result, that is, the same bf16 weights computed by
transformers in fp32, and ours may lie no further from it than theirs does, which runs under
autocast, as ``transformers.Trainer`` does with ``bf16``. Errors are root mean squares of the
distance, as multiples of theirs (where theirs is below one rounding of the result, of that). Every
feature of a state counts relative to its own size: in SmolLM2-135M two numbers are 20,000 where the
third is 1,700 ("massive activations", arXiv:2402.17762), and nothing else would be measured. A
quarter more is allowed for chance in states, logits, all gradients together and the whole trained
adapter, which are thousands of numbers; a factor of two, one bit, in losses and single leaves of
the gradient, which are few. A leaf that few tokens reach, as those behind the one token that is
classified, sums so few roundings that theirs may cancel by luck; so a leaf is held against the root
mean square of their distance over all leaves where its own is smaller. Logits that are few, as
those of a regression, are judged as such a leaf, with the distance of the last states.

The leaves of the trained adapter are not judged one by one: AdamW divides each entry by its size,
so entries whose gradient vanishes go where rounding sends them, on either side. Files are compared
bit for bit.
"""

from typing import Literal, NamedTuple

Quantity = Literal[
    "hidden states",
    "logits",
    "loss",
    "gradients",
    "gradients together",
    "loss curve",
    "adapters",
]
EXACT = 0.0
ROUNDING = 2.0**-8
"""Largest relative error of rounding to bf16, which keeps eight significant bits."""
NO_FURTHER = 2.0
"""How many times as far as theirs in fp32 ours may be from the exact result: one bit, for chance.
"""

FEW = 256
"""Numbers below which chance decides by more than a quarter."""


class Budgets(NamedTuple):
    """The largest error of each quantity that passes, and in words what an error is.

    ``calibrated`` where it is a multiple of the other side's own; ``wider`` is the dtype of the
    exact result.
    """

    limits: dict[Quantity, float]
    measure: str
    calibrated: bool
    wider: str


BUDGETS = {
    "float32": Budgets(
        {
            "hidden states": 1e-5,
            "logits": 1e-5,
            "loss": 1e-5,
            "gradients": 1e-4,
            "loss curve": 1e-5,
            "adapters": 1e-4,
        },
        "largest difference, relative to the range of states and logits, to the value of a loss, "
        "to the largest entry of a leaf; of the trained adapter, root mean squares. Where that was "
        "exceeded, the difference from transformers and PEFT in fp64, and a larger budget is twice "
        "their own",
        calibrated=False,
        wider="float64",
    ),
    "bfloat16": Budgets(
        {
            "hidden states": 1.25,
            "logits": 1.25,
            "loss": 2.0,
            "gradients": 2.0,
            "gradients together": 1.25,
            "loss curve": 2.0,
            "adapters": 1.25,
        },
        "root mean square of our distance from fp32 on the same weights, as a multiple of that of "
        "transformers and PEFT under autocast",
        calibrated=True,
        wider="float32",
    ),
}
