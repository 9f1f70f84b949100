"""The error tree: what can go wrong, and the exit code each kind ends with.

BBPromptError (1)
├── UsageError (2)            a flag, a config key or a value is wrong
├── DataError (65)            a data file, a record or a label is wrong
│   ├── ArtifactError         a prompt artifact or a backbone file is corrupt or does not fit
│   └── TextError             the model cannot read a text, as when it is too long
├── OracleError (69)          the model cannot be reached or breaks its contract
├── DiskError (74)            a file of the run cannot be written or read
│   └── JournalCorrupt        the journal is damaged anywhere but in its last line
├── Interrupted (75)          stopped by a signal; the run can be resumed
│   └── RunLocked             another process works on this run directory
└── ResumeMismatch (78)       the run to resume was made with other settings, data, model or code

Every message is one line that names what is wrong, where (file, line, flag or key), and what to do.
"""

from __future__ import annotations

import re
from typing import ClassVar

__all__ = [
    "ArtifactError",
    "BBPromptError",
    "DataError",
    "DiskError",
    "Interrupted",
    "JournalCorrupt",
    "OracleError",
    "ResumeMismatch",
    "RunLocked",
    "TextError",
    "UsageError",
]


_NUMBERED = re.compile(r"text ([1-9][0-9]{0,8}): ")


class BBPromptError(Exception):
    """Root of all errors that bbprompt raises on purpose."""

    exit_code: ClassVar[int] = 1


class UsageError(BBPromptError):
    """A flag, a config key or a value is wrong."""

    exit_code = 2


class DataError(BBPromptError):
    """A data file, a record or a label is wrong."""

    exit_code = 65


class ArtifactError(DataError):
    """A prompt artifact or a backbone file is corrupt, or the two do not fit each other."""


class TextError(DataError):
    """The model cannot read a text of a batch; the message begins with `text N: `, counted from 1.

    A model knows texts and no files. Number and reason are read from the message, the one thing that every way from
    a model here, on Ray or behind a server keeps.
    """

    @property
    def number(self) -> int:
        """Which text of the batch, counted from 1; 0 where the message does not say."""
        found = _NUMBERED.match(str(self))
        return int(found[1]) if found else 0

    @property
    def reason(self) -> str:
        """The message without the number."""
        return _NUMBERED.sub("", str(self), count=1)


class OracleError(BBPromptError):
    """The model cannot be reached, or its answer breaks the oracle's contract."""

    exit_code = 69


class DiskError(BBPromptError):
    """A file of the run cannot be written or read."""

    exit_code = 74


class JournalCorrupt(DiskError):
    """The journal is damaged anywhere but in its last, torn line."""


class Interrupted(BBPromptError):
    """The run was stopped; everything settled is on disk and it can be resumed."""

    exit_code = 75


class RunLocked(Interrupted):
    """Another process works on this run directory."""


class ResumeMismatch(BBPromptError):
    """The run was made with other settings, data, model or code than are here now."""

    exit_code = 78
