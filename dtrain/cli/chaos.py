"""`dtrain chaos`."""

import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from dtrain.cli.arguments import Overrides
from dtrain.cli.progress import progress
from dtrain.errors import DAMAGED
from dtrain.terminal import say


def chaos(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="a YAML file; default: a small job on digits")
    ] = None,
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option(min=0, help="which faults, where and in which order")] = 0,
    faults: Annotated[int | None, typer.Option(min=1, help="how many; default: as --minutes allow")] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="how long, where --faults is not given")] = 5.0,
    ranks: Annotated[int, typer.Option(min=1, help="of the job")] = 2,
    out: Annotated[Path, typer.Option(help="the report, Markdown")] = Path("chaos.md"),
) -> None:
    """Kill, damage and starve a job again and again, and compare it with the same job left alone.

    The job is CONFIG made short, in a folder of its own: your runs and shards are not touched. Exit code 1 where a
    fault was not survived.
    """
    from importlib.metadata import entry_points

    import numpy as np

    from dtrain.chaos.campaign import Undisturbed, machine, play
    from dtrain.chaos.job import Job, small_disk
    from dtrain.chaos.report import markdown
    from dtrain.chaos.schedule import Schedule

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the ranks and the disk go too
    work = Path(tempfile.mkdtemp(prefix="dtrain-chaos-"))
    overrides = overrides or []
    with progress("chaos") as show, small_disk(work / "disk", config, overrides) as disk:
        (command,) = entry_points(group="console_scripts", name="dtrain")
        job = Job.make(work, config, overrides, ranks, disk, command)
        undisturbed = Undisturbed.train(job)
        schedule, began = Schedule(job, np.random.default_rng(seed)), time.monotonic()

        def enough(met: int) -> bool:
            return met >= faults if faults else time.monotonic() - began > 60 * minutes

        results = []
        for result in play(job, undisturbed, schedule.next, enough):
            results.append(result)
            done = (len(results), faults) if faults else (round(time.monotonic() - began), round(60 * minutes))
            show(*done)
            if not result.survived:
                say(f"not survived: {result.plan.what}: {'; '.join(result.problems)}")
    typed = shlex.join(["dtrain", *sys.argv[1:]])
    out.write_text(markdown(job, results, typed, seed, machine()))
    survived = sum(result.survived for result in results)
    say(f"{out}: {survived} of {len(results)} survived; the attempts' logs are in {work}")
    if survived < len(results):
        raise typer.Exit(DAMAGED)
