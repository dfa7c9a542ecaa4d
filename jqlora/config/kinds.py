"""Kinds of numbers that settings are, and how strictly they are read."""

from typing import Annotated

from pydantic import ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
STRICT = ConfigDict(extra="forbid", strict=True)
