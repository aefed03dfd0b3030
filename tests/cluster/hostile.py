"""Names that a shell or SLURM would take for more than names, and a job that bears them."""

from pathlib import Path

from dtrain.cluster import slurm
from tests.digits import tiny

HOSTILE = [
    "$(touch pwned)",
    "`touch pwned`",
    "; touch pwned",
    "x; touch pwned #",
    "&& touch pwned",
    "|| touch pwned",
    "| touch pwned",
    "> pwned",
    "'; touch pwned; '",
    '"; touch pwned; "',
    "'\"'\"'$(touch pwned)",
    "${IFS}touch${IFS}pwned",
    "$HOME ~ $0 $SLURM_JOB_ID",
    "a b  c",
    "*",
    "[a-z]?{x,y}",
    "!!",
    "-rf",
    "--local_rank=3 --help",
    "#SBATCH --wrap=pwned",
    "%%name %%folder %j %%%A",
    "%%(touch pwned)",
    "(touch pwned)",
    "EOF",
    "é ü 图像 🙂",
    "=",
    "&",
]
DIGITS = Path("digits")  # a script is written without looking at the data


def rendered(folder, name, request):
    """(script, job, overrides) of a training whose config, experiment and run directory have this name."""
    config = tiny(DIGITS, Path("runs"))
    run = config.run.model_copy(update={"dir": str(folder / f"runs {name}")})  # the config would expand ${variables}
    config = config.model_copy(update={"run": run})
    overrides = [f"tracking.experiment={name}", f"run.dir={folder / f'runs {name}'}"]
    job = slurm.training(folder / f"{name}.yaml", overrides, config.run.path, config.data.workers)
    return slurm.render(job, request), job, overrides
