"""Benchmarks: how their files are written, what a model is given of them, and what it is scored by.

TASKS is the list of them. A task is read (:mod:`.labelled`, :mod:`.squad`, :mod:`.choices`), made
into rows (:mod:`.features`, :mod:`.spans`), laid into batches (:mod:`.batches`) and scored
(:mod:`.scoring`).
"""

from jqlora.tasks.table import TASKS, Task, task_named

__all__ = ["TASKS", "Task", "task_named"]
