"""A file system of its own that is soon full."""

import contextlib
import os
import subprocess

import pytest

from tests.afterwards import afterwards


@contextlib.contextmanager
def small_disk(path, options):
    """A tmpfs at `path`, mounted with these options; skips the test where it may not be mounted."""
    path.mkdir(parents=True)
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path]).returncode:
        pytest.skip("mounting a small file system takes root")
    with afterwards('umount -l "$1"', str(path)):
        yield
