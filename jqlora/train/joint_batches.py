"""The batches of adapters that are trained together, each in the order of its own seed."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jqlora.data import Loader
from jqlora.errors import DataError
from jqlora.train.loss import Batch


class JointBatches:
    """What each member's loader yields; members of one seed have one loader.

    ``one`` says whether all have: then batches are its own, ``[B, T]``. Else they are put on top of
    each other, ``[members, B, T]``. Raises DataError for loaders of different lengths.
    """

    def __init__(self, loaders: Sequence[Loader]):
        self._loaders = list({id(loader): loader for loader in loaders}.values())
        self._of = [self._loaders.index(loader) for loader in loaders]
        self.one = len(self._loaders) == 1
        self.total_steps = loaders[0].total_steps
        steps = {loader.total_steps for loader in loaders}
        if len(steps) > 1:
            raise DataError(f"members make {sorted(steps)} steps: their data differ")

    def __next__(self) -> Batch:
        batches = [next(loader) for loader in self._loaders]
        if self.one:
            return batches[0]
        return {name: np.stack([batches[i][name] for i in self._of]) for name in batches[0]}

    def get_state(self) -> dict[str, Any]:
        """The positions of all, as a small dict that JSON can hold."""
        return {"loaders": [loader.get_state() for loader in self._loaders]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from these positions; raises DataError as a loader's ``set_state`` does."""
        for loader, position in zip(self._loaders, state["loaders"], strict=True):
            loader.set_state(position)
