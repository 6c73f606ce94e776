"""Errors that are the user's to mend.

A command prints such an error as one line and exits with code 2. Any other exception is a
bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar


class ColossalLlamaError(Exception):
    """Says what is wrong, where (``file:line`` where there is one), and what to do."""

    exit_code = 2
    on_all_processes = False


Error = TypeVar("Error", bound=ColossalLlamaError)


def agreed(error: Error) -> Error:
    """Marks an error that all processes of a job raise, at the same place."""
    error.on_all_processes = True
    return error


class UsageError(ColossalLlamaError):
    """The flags or the configuration file cannot be honoured."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(self.problems))


class DataError(ColossalLlamaError):
    """An input file is missing, malformed or does not belong to what it is used with."""


class ProcessError(ColossalLlamaError):
    """What one process of several met: unlike other errors, each of them has to say its own."""


class LostPeerError(ProcessError):
    """Another process of the job is gone."""

    exit_code = 1  # why it is gone, and whether anybody can mend that, is not known here


class RecordError(ColossalLlamaError):
    """One record of the input is malformed.

    Says only the reason: who reads knows file and line. ``text`` is the beginning of the record.
    """

    def __init__(self, reason: str, text: str = "") -> None:
        super().__init__(reason)
        self.text = text
