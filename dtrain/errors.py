"""What a process says to its caller: the error a user can mend, and the exit codes."""

import os

from dtrain.credentials import redacted, to_set
from dtrain.terminal import printable

DONE = 0
DAMAGED = 1  # a check found damage
FAILED = 1  # what no setting mends, as Python ends; starting again may
USER_ERROR = 2
STOPPED = 75  # stopped on request with a checkpoint: run me again
HANG = 76
INTERRUPTED = 130  # by Ctrl-C, at once


class UserError(ValueError):
    """Something the user can put right. Its message is one line: what is wrong, where, and what to do.

    Names of files and members come into it as they are, so what is not printable, a line break in a name, is escaped;
    addresses and values of the user's too, so what is secret is left out.
    The command line prints the message without a traceback and exits with code 2.
    """

    def __init__(self, message: str):
        message = redacted(message)
        super().__init__(printable(message + to_set(message)))


def from_where(path: str | os.PathLike) -> str:
    """What a message says behind a relative path that is not there: the folder that it was looked for from."""
    return "" if os.path.isabs(path) else f" (looked for from {os.getcwd()})"


def message_of(error: UserError | PermissionError) -> str:
    """Its one line: a file that one may not open is met in many places, and always the user's to mend.

    Raises a PermissionError again that is of no file.
    """
    if isinstance(error, UserError):
        return str(error)
    if error.filename is None:
        raise error
    return f"cannot open {error.filename}: {error.strerror}; ask its owner, or name another place"


class SharedError(UserError):
    """One that all ranks raise together, wherever it was met, so that rank 0 alone says it."""


class NotFinite(SharedError):
    """What a network gave is no finite number. No setting need be wrong, so other work goes on without it."""


class SharedFailure(RuntimeError):
    """What one rank met and no setting mends, a bug or a lack of memory; raised by all ranks together.

    On the rank that met it, its cause is the exception itself.
    """


class BadSample(UserError):
    """A sample that will be as unusable tomorrow: damaged, missing or undecodable. `data.on_error` decides about it.

    Trouble that may pass, such as a disk or a network that fails, is a plain UserError and always ends the run.
    """
