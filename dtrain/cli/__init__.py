"""The `dtrain` command. Each command imports what it needs when it runs, so that `--help` is quick."""

import sys

import typer

from dtrain.cli import chaos, checkpoints, cluster, data, evaluation, planning, running
from dtrain.errors import USER_ERROR, SharedError, UserError, told
from dtrain.training.output import say_error

UsageError = typer.BadParameter.__base__  # typer has a click of its own and does not export this class

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train diffusion models at cluster scale and review their FID curves.",
)

for command in (
    running.train,
    data.pack,
    data.index,
    data.verify,
    evaluation.evaluate,
    evaluation.sweep,
    evaluation.reference,
    evaluation.sample,
    evaluation.report,
    running.sync,
    cluster.submit,
    cluster.status,
    planning.plan,
    planning.doctor,
    chaos.chaos,
):
    app.command()(command)
app.add_typer(data.data, name="data")
app.add_typer(checkpoints.checkpoints, name="checkpoints")


def main(command: str | None = None) -> None:
    """Entry point. A mistake of the user's ends in one line and exit code 2, on rank 0 only where all ranks make it."""
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    if command is not None:  # launch/train.py is `dtrain train`
        arguments = [command, *arguments]
    try:
        code = app(args=arguments, prog_name="dtrain", standalone_mode=False)
    except (UserError, PermissionError) as e:
        say_error(told(e), shared=isinstance(e, SharedError))
        code = USER_ERROR
    except UsageError as e:
        hint = "; settings are given as key.sub=value" if arguments[:1] in (["train"], ["submit"]) else ""
        say_error(f"{e.format_message().rstrip('.')}{hint}")
        code = USER_ERROR
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    sys.stdout.flush()
    sys.exit(code or 0)
