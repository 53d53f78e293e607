"""What can go wrong, each as one line: value given; why it is wrong; what is allowed; next step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class JaxbenchError(Exception):
    """An error that the user can understand and act on; its text is one line."""

    def __init__(self, text: str):
        super().__init__(" ".join(str(text).split()))


class UsageError(JaxbenchError):
    """What was asked for does not exist or cannot be (exit code 2)."""


class CandidateError(JaxbenchError):
    """A candidate file or candidate is not usable (exit code 2)."""


class LayoutError(JaxbenchError):
    """A batch, a parameter or the devices do not divide as the layout asks."""


class UnknownPeakError(JaxbenchError):
    """A chip has no figure for something that a program uses."""


class ImpossibleError(JaxbenchError):
    """A prediction contradicts the chip's own figures."""


class MeasureError(JaxbenchError):
    """A step ran, but what it gave cannot stand as a measurement."""


class DataError(JaxbenchError):
    """A data set is damaged, is another one than before, or lacks what a task needs."""


class StorageError(JaxbenchError):
    """Results could not be written: no space left, or no permission."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Stands where a value would: what did not work, at which stage, in which words.

    Attributes:
      stage: `load`, `program`, `compile`, `fit`, `price`, `measure` or `worker`.
      error: Name of the error's type, or of what ended the worker.
      text: One line for people.
      needed_bytes, available_bytes: Device memory, where the stage is `fit`.
    """

    stage: str
    error: str
    text: str
    needed_bytes: int | None = None
    available_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns JSON-ready values without the fields that say nothing."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in values.items() if value is not None}
