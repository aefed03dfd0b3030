"""What must be put back on this machine after a test, also where the test itself is killed."""

import subprocess
from contextlib import contextmanager


@contextmanager
def afterwards(script: str, *arguments: str):
    """Run this bash with these $1, $2, … at the end of the block, or when this process ends in whatever way.

    A shell waits for the end of a pipe that only this process holds. Raises CalledProcessError where the script fails.
    """
    command = ["bash", "-c", f"trap '' INT TERM HUP; cat >/dev/null; {script}", "afterwards", *arguments]
    waiting = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        waiting.stdin.close()
        if code := waiting.wait():
            raise subprocess.CalledProcessError(code, command)
