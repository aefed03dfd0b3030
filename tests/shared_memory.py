"""A /dev/shm of one's own, as a container has it."""

import os

import pytest

from dtrain.chaos.attempts import own_shared_memory as own_shared_memory

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
