"""The `dtrain` command. Each command imports what it needs when it runs, so that `--help` is quick."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

from dtrain.interrupt import ctrl_c, die_quietly

if Path(sys.argv[0]).name == "dtrain":  # the command itself, and not somebody who imports this
    die_quietly()

import typer

from dtrain import __version__, distributed, launcher, plugins
from dtrain.cli import (
    chaos,
    checkpoints,
    cluster,
    comparison,
    configuration,
    data,
    evaluation,
    init,
    planning,
    running,
    sampling,
)
from dtrain.errors import FAILED, USER_ERROR, SharedError, SharedFailure, UserError, message_of
from dtrain.training.record.output import clean_tracebacks, forgive_output, say_error

UsageError = typer.BadParameter.__base__  # typer has a click of its own and does not export this class

# What a launcher may start on all ranks.
DISTRIBUTED = ("train", "evaluate", "sweep", "compare", "reference", "sample", "pairs", "invert", "doctor", "encode")
LOCAL_RANK = ("--local_rank", "--local-rank")

app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train diffusion models at cluster scale and review their FID curves.",
)

# Command → the example that ends its help. All of them run as they stand after `make demo`, in this order; encode needs
# the folder of an autoencoder, and compare what `make trilemma` trains.
EXAMPLES = {
    init.init: "dtrain init sklearn:digits > digits.yaml",
    running.train: "dtrain train configs/digits-dit.yaml --check",
    data.pack: "dtrain pack sklearn:digits data/digits --holdout 360",
    data.encode: "dtrain encode data/digits/train data/digits-latents --first-stage vae --size 8 --mirrors",
    data.index: "dtrain index data/digits/train",
    data.verify: "dtrain verify data/digits/train",
    evaluation.evaluate: "dtrain evaluate digits --n 1000 --steps 20",
    evaluation.sweep: "dtrain sweep digits --steps 5,10 --eta 0,1 --n 500",
    comparison.compare: "dtrain compare digits digits-flow digits-meanflow",
    evaluation.reference: "dtrain reference data/digits/holdout --features pixels",
    sampling.sample: "dtrain sample digits --label 3 --guidance 2 --out threes/",
    sampling.pairs: "dtrain pairs digits data/digits-pairs --n 1000 --steps 20 --guidance 1.5",
    sampling.invert: "dtrain invert digits threes/ --label 3",
    evaluation.report: "dtrain report digits",
    running.sync: "dtrain sync digits",
    configuration.config: "dtrain config eval",
    cluster.submit: "dtrain submit configs/digits-dit.yaml --gpus-per-node 8 --time 1:00:00 --dry-run",
    cluster.status: "dtrain status",
    planning.plan: "dtrain plan configs/digits-dit.yaml --gpus-per-node 2",
    planning.doctor: "dtrain doctor configs/digits-dit.yaml",
    chaos.chaos: "dtrain chaos --faults 5",
}
GROUPS = {
    data.data: {
        "audit": "dtrain data audit digits",
        "bench": "dtrain data bench configs/digits-dit.yaml --seconds 3",
    },
    checkpoints.checkpoints: {
        "list": "dtrain checkpoints list digits",
        "verify": "dtrain checkpoints verify digits",
        "prune": "dtrain checkpoints prune digits --keep-last 3",
        "export": "dtrain checkpoints export digits --ema 0 --out exported/digits",
        "reconstruct": "dtrain checkpoints reconstruct RUN --sigma 0.13 --out averaged",
    },
}


def _ending(example: str) -> str:
    return f"\b\nExample: {example}"  # click breaks no lines after \b


@app.callback(invoke_without_command=True)
def _dtrain(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    plugin: Annotated[
        list[str] | None, typer.Option(metavar="MODULE", help="a module or file with parts; anywhere in the command")
    ] = None,
) -> None:
    """`main` has taken --plugin by now, wherever it stood; it is here for who asks what there is."""
    if version:
        print(f"dtrain {__version__}")
        raise typer.Exit
    _help_alone(context)


def _help_alone(context: typer.Context) -> None:
    """A name without a command is a question for what there is."""
    if context.invoked_subcommand is None:
        print(context.get_help())


for command, example in EXAMPLES.items():
    app.command(epilog=_ending(example))(command)
for group, examples in GROUPS.items():
    group.callback(invoke_without_command=True)(_help_alone)
    for command in group.registered_commands:
        command.epilog = _ending(examples[command.name])
app.add_typer(data.data, name="data")
app.add_typer(checkpoints.checkpoints, name="checkpoints")


def main(command: str | None = None) -> None:
    """Entry point. A mistake of the user's ends in one line and exit code 2, on rank 0 only where all ranks make it.

    Ctrl-C ends in exit code 130, or in what the command makes of it.
    """
    ctrl_c.watch(partial(say_error, shared=True))
    local_ranks = [a for a in sys.argv[1:] if a.startswith(LOCAL_RANK)]  # as launchers of torch and DeepSpeed give it
    arguments = [a for a in sys.argv[1:] if not a.startswith(LOCAL_RANK)]
    arguments = _without_plugins(arguments)
    if command is not None:  # launch/train.py is `dtrain train`
        arguments = [command, *arguments]
    clean_tracebacks()
    if arguments[:1] == ["train"]:
        forgive_output()
    try:
        if arguments[:1] and arguments[0] in DISTRIBUTED:
            launcher.adopt(local_rank=local_ranks[0].partition("=")[2] if local_ranks else None)
        elif not distributed.has_met():
            launcher.leave()
        code = app(args=arguments, prog_name="dtrain", standalone_mode=False)
        if ctrl_c.is_ending:  # typer makes an exit code of a KeyboardInterrupt
            code = ctrl_c.end()
    except (UserError, PermissionError) as e:
        code = _mistake(message_of(e), shared=isinstance(e, SharedError))
    except UsageError as e:
        hint = "; settings are given as key.sub=value" if arguments[:1] in (["train"], ["submit"]) else ""
        code = _mistake(f"{e.format_message().rstrip('.')}{hint}")
    except (KeyboardInterrupt, typer.Abort):
        code = ctrl_c.end()
    except Exception as e:
        if ctrl_c.is_ending:
            code = ctrl_c.end()  # a connection to a rank that has left first, say
        elif isinstance(e, SharedFailure) and e.__cause__ is None:
            say_error(str(e), shared=True)  # the rank that met it has the traceback
            code = FAILED
        else:
            # Whatever it is, the other ranks must not wait for this one.
            distributed.cannot_come(f"{type(e).__name__}: {e}")
            raise
    ctrl_c.rest()
    sys.stdout.flush()
    sys.exit(code or 0)


def _without_plugins(arguments: list[str]) -> list[str]:
    """The arguments without `--plugin MODULE`, which a configuration may need before any command reads it."""
    left, named, rest = [], [], iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if option == "--plugin":
            named.append(value if equals else next(rest, ""))
        else:
            left.append(argument)
    plugins.name_also(str(Path(name).absolute()) if name.endswith(".py") else name for name in named if name)
    return left


def _mistake(message: str, shared: bool = False) -> int:
    """Say it once, on rank 0's terminal; the exit code."""
    if shared or not distributed.cannot_come(message):
        say_error(message, shared)
    return USER_ERROR
