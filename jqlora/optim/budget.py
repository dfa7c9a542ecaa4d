"""How many triplets AdaLoRA keeps after each update, and after which updates it chooses anew.

With T updates in all, t_i in the initial phase and t_f in the final one, b_0 triplets at first and
b_T at last, the budget after update t (counted from 1) is

    b_0                                                            for t <= t_i
    int(b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_f - t_i))³)      for t_i < t <= T - t_f
    b_T                                                            afterwards

This is the authors' code and PEFT's ``budget_schedule``. The paper (section 3.3) prints
``t - t_i - t_f`` in the numerator, which would exceed b_0 at t = t_i and not reach b_T at
t = T - t_f; that is taken for a misprint, under both conventions.
"""

import dataclasses

from jqlora.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """The schedule of one run; ``initial`` and ``target`` are triplets of the whole model, the
    other numbers are updates.

    Raises :class:`ConfigError`, with the numbers, for a schedule that never reduces the budget.
    """

    initial: int
    target: int
    total_steps: int
    initial_steps: int
    final_steps: int
    interval: int

    def __post_init__(self) -> None:
        for field, least in (
            ("total_steps", 1),
            ("initial_steps", 0),
            ("final_steps", 0),
            ("interval", 1),
        ):
            if getattr(self, field) < least:
                raise ConfigError(f"{field}={getattr(self, field)} must be at least {least}")
        if self.initial_steps + self.final_steps >= self.total_steps:
            raise ConfigError(
                f"initial_steps={self.initial_steps} and final_steps={self.final_steps} leave none "
                f"of the {self.total_steps} steps to reduce the budget in: their sum must be "
                f"below {self.total_steps}"
            )
        if not 0 < self.target < self.initial:
            raise ConfigError(
                f"the target of {self.target} triplets must lie between 1 and {self.initial - 1}, "
                f"below the {self.initial} of the start"
            )

    @property
    def frozen_from(self) -> int:
        """T - t_f: the update after which the last choice is made."""
        return self.total_steps - self.final_steps

    def after(self, step: int) -> int:
        """b(t), in the floating-point order of the authors' code, so that rounding is theirs."""
        if step <= self.initial_steps:
            return self.initial
        if step > self.frozen_from:
            return self.target
        share = 1 - (step - self.initial_steps) / (self.frozen_from - self.initial_steps)
        return int((self.initial - self.target) * (share**3) + self.target)

    def chooses(self, step: int) -> bool:
        """Whether triplets are chosen anew: every ``interval`` updates of the middle phase, and at
        its end (PEFT's ``force_mask``)."""
        inside = self.initial_steps < step < self.frozen_from
        return step == self.frozen_from or (inside and step % self.interval == 0)
