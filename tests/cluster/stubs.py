"""Executables in place of SLURM's and deepspeed's that write down how they were called, to run a batch script alone."""

import os
import subprocess
import sys
from pathlib import Path

RECORD = '#!/bin/bash\nprintf "%s\\0" "${0##*/}" "$@" >>"$RECORD/${0##*/}.$$"\n'
PROGRAMS = {
    "srun": RECORD + 'while [[ $1 == --* ]]; do shift; done\nSLURM_NODEID=0 "$@"\n',
    "scontrol": RECORD
    + 'case $1$2 in showhostnames) printf "n1\\nn2\\n";; shownode) echo "NodeName=n1 NodeAddr=10.0.0.7 x=y";; esac\n'
    + '[[ $1 != requeue ]] || kill -9 $PPID\n',  # SLURM ends the script
    "sinfo": "#!/bin/bash\necho gpu:h100:8\n",
    "squeue": RECORD + "echo 2031-01-02T03:04:05\n",
    "dtrain": RECORD + 'eval "${CHECK:-:}"\n',
    "deepspeed": RECORD + 'eval "${TRAINING:-:}"\n',
}  # fmt: skip


class Stubs:
    """folder: where they are; CHECK and TRAINING are bash that stands for `dtrain train --check` and the training."""

    def __init__(self, folder: Path, monkeypatch):
        self.bin, self.record = folder / "bin", folder / "record"
        self.bin.mkdir(parents=True)
        self.record.mkdir()
        for name, text in PROGRAMS.items():
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{self.bin}:{os.environ['PATH']}")
        monkeypatch.setattr(sys, "executable", str(self.bin / "python"))  # where the script looks for deepspeed

    def start(self, script: str, run: Path, log: Path, **environment: str) -> subprocess.Popen:
        """Start a rendered script as job 7 of two nodes, its output appended to `log`."""
        (run / "logs").mkdir(parents=True, exist_ok=True)
        variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "2"}
        variables |= {"RECORD": str(self.record), "RUN": str(run)}
        with open(log, "a") as output:
            return subprocess.Popen(
                ["bash", "-c", script], env=os.environ | variables | environment, stdout=output, stderr=output
            )

    def run(self, script: str, run: Path, log: Path, **environment: str) -> int:
        return self.start(script, run, log, **environment).wait(30)

    def calls(self, program: str) -> list[list[str]]:
        """The arguments of each call, in the order of the calls."""
        files = sorted(self.record.glob(f"{program}.*"), key=lambda p: p.stat().st_mtime_ns)
        return [path.read_bytes().decode(errors="surrogateescape").split("\0")[1:-1] for path in files]
