"""A run from its config to its report."""

from jqlora.run.sizes import plan_run, table
from jqlora.run.training import Outcome, resume, train

__all__ = ["Outcome", "plan_run", "resume", "table", "train"]
