"""What several commands take: a run, settings of an evaluation."""

from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key.sub=value ...]", help="override config keys")]
METRICS_HELP = "fd,fd_infinity,kid,precision,recall,is,bpd"
FEATURES_HELP = "inception, effnet_lite0, pixels, a TorchScript file, or auto: the first that is here"
RunName = Annotated[str, typer.Argument(metavar="RUN", help="a run directory, or a name under runs/")]


def with_eval(config, chosen: dict, raw: bool):
    """The config with other `eval` settings, validated like the file's own."""
    from dtrain import config as configuration

    tree = config.model_dump(mode="json")
    tree["eval"] |= chosen | ({"ema": None} if raw else {})
    return configuration.validate(tree, "the command line", [f"eval.{k}" for k in chosen])


def values(text: str) -> list:
    """`5,10` as numbers; what is no number stays a word for its key to judge."""
    import yaml

    return [yaml.safe_load(part) for part in text.split(",")]
