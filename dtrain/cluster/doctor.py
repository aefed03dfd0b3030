"""Is this machine, and are these files, fit for a run? Each check says what it found and what to do."""

from collections.abc import Callable
from pathlib import Path

from dtrain import distributed
from dtrain.cluster import machine, surroundings
from dtrain.cluster.finding import Finding, bad
from dtrain.config import Config


def examine(config: Config | None, full: bool, on_check: Callable[[float, int], None]) -> list[Finding]:
    """What every check found; one that breaks down is bad itself, and the others go on.

    Under a launcher every rank calls it; the checks that need no other rank are rank 0's alone and come last.
    """
    together = {
        "collective": machine.collective,
        "file system": lambda: surroundings.file_system(config.run.path if config else Path.cwd()),
    }
    if config is not None:
        together["shared memory"] = lambda: machine.shared_memory(config)
    alone = {
        "versions": machine.versions,
        "DeepSpeed's defaults": machine.defaults,
        "accelerator": lambda: machine.accelerator(config.deepspeed.precision if config else None),
        "Inception": lambda: surroundings.inception(config.eval if config else None),
    }
    if config is not None:
        alone |= {
            "disk space": lambda: surroundings.disk_space(config),
            "MLflow": lambda: surroundings.mlflow(config.run, config.tracking),
            "walltime": lambda: surroundings.walltime(config.run, config.train),
            "samples": lambda: surroundings.samples(config, full),
            "shards": lambda: surroundings.shards(
                config.data, full, lambda part: on_check(round(done + part, 2), len(todo))
            ),
        }
    todo, findings = together | (alone if distributed.rank() == 0 else {}), []
    for done, (name, check) in enumerate(todo.items()):
        if done == len(together) and distributed.world_size() > 1:
            distributed.finalize()  # the others need not wait for rank 0, which may read shards for hours
        try:
            findings.append(check())
        except Exception as e:
            problem = " ".join(f"{type(e).__name__}: {e}".split())
            findings.append(bad(name, problem, "this check itself failed: are the packages the tested ones?"))
        on_check(done + 1, len(todo))
    return findings
