"""A /dev/shm of one's own, as a container has it."""

import ctypes
import os
import subprocess

import pytest

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
NEW_MOUNTS = 0x20000  # CLONE_NEWNS of linux/sched.h


def own_shared_memory(size: str) -> None:
    """For this process and those it forks from now on; it goes with them. size: as tmpfs takes it, such as 2m."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm"], check=True)
