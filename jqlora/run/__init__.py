"""A run from its config to its report."""

from jqlora.run.resuming import resume
from jqlora.run.sizes import plan_run, table
from jqlora.run.sweep import sweep
from jqlora.run.training import Outcome, train

__all__ = ["Outcome", "plan_run", "resume", "sweep", "table", "train"]
