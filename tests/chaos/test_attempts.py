"""What an attempt leaves behind: nothing."""

import fcntl
import subprocess
import sys

from dtrain.chaos import attempts

HOLDER = """
import fcntl, sys, time
held = bytearray(2**29)  # takes a while to give back
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(1000)
"""


def test_a_launched_attempt_that_is_ended_holds_no_lock_any_more(tmp_path):
    """As a rank under `deepspeed` does: the grandchild of what was started, outlived by nobody's wait."""
    for _ in range(3):
        command = ["bash", "-c", f"{sys.executable} -c '{HOLDER}' {tmp_path}/lock & sleep 1000"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
            assert process.stdout.readline() == "held\n"
            attempts._end_session(process)
            with open(tmp_path / "lock", "w") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert process.returncode == -9
