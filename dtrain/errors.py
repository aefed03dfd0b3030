"""What a process tells its caller: the error a user can mend, and the exit codes."""

DONE = 0
DAMAGED = 1  # a check found damage
USER_ERROR = 2
STOPPED = 75  # stopped on request with a checkpoint: run me again
HANG = 76


class UserError(ValueError):
    """Something the user can put right. Its message is one line: what is wrong, where, and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """


class SharedError(UserError):
    """One that all ranks raise together, wherever it was met, so that rank 0 alone says it."""


class BadSample(UserError):
    """A sample that will be as unusable tomorrow: damaged, missing or undecodable. `data.on_error` decides about it.

    Trouble that may pass, such as a disk or a network that fails, is a plain UserError and always ends the run.
    """
