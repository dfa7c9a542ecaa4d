"""The errors users meet, one class per kind of mistake; the command line prints each on one line.

An error is named for what went wrong, and its message names the value, where it came from and what
is accepted. Every class is also the built-in error that a caller would expect, so that
``except ValueError`` keeps working.
"""


class JqloraError(Exception):
    """Base of every error that a user can mend; ``jqlora`` prints it and exits with status 2."""


class NoSiteMatched(JqloraError, ValueError):
    """A target, exclusion or pattern matched no module.

    The message lists the nearest module names. ``jqlora plan CONFIG`` prints all of them::

        jq.LoRA(targets=["q_proj", "v_proj"])   # names end a module's path
        jq.LoRA(targets=r".*self_attn\\.[qv]_proj")   # or one regular expression for the whole path
    """


class AdapterNotReached(JqloraError, RuntimeError):
    """A trace ended without calling a module that the plan adapts: its adapter would be lost.

    Most often a module is wrapped in a class-level ``nn.jit`` whose old trace was reused, or the
    model took a branch that skips the module. Remove the inner ``nn.jit`` (the outer step is jitted
    anyway) or exclude the module from the plan.
    """


class UnsupportedSite(JqloraError, ValueError):
    """A method cannot serve this kind of module, or a rank exceeds what its matrix can hold."""


class SourceError(JqloraError, FileNotFoundError):
    """A model or data source cannot be found or reached."""


class CheckpointError(JqloraError, ValueError):
    """A checkpoint is damaged or disagrees with its config: tensors missing, extra, misshapen."""


class SaveError(JqloraError, OSError):
    """Something cannot be written (full disk, no permission); what was there before is intact."""


class AdapterFileError(JqloraError, ValueError):
    """An adapter directory cannot be used with this model."""


class MergeError(JqloraError, ValueError):
    """The adapters cannot be folded into the base weights."""


class ConfigError(JqloraError, ValueError):
    """A configuration has an unknown key, a wrong type, or values that contradict each other."""


class DataError(JqloraError, ValueError):
    """A record, a tokenizer or a data set cannot be used; the message names the file and line."""


class RunError(JqloraError, RuntimeError):
    """A run directory cannot be started, resumed or written."""


class NonFiniteLoss(JqloraError, FloatingPointError):
    """The loss or a gradient is NaN or infinite; the message names the step and the saved batch."""
