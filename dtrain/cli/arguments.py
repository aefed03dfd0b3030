"""What several commands take: a run, settings of an evaluation."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from dtrain.credentials import shown_argument
from dtrain.errors import UserError

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key.sub=value ...]", help="override config keys")]
FEATURES_HELP = "inception, dinov2, effnet_lite0, pixels, a TorchScript file, or auto: the first that is here"


def _runs(incomplete: str) -> list[str]:
    """What a shell may complete a run's name to."""
    return sorted(
        config.parent.name for config in Path("runs").glob("*/config.yaml") if config.parent.name.startswith(incomplete)
    )


RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="a run directory, or a name under runs/", autocompletion=_runs)
]
Steps = Annotated[int | None, typer.Option(min=1, help="DDIM steps")]
Eta = Annotated[str | None, typer.Option(help="of ddim: 0 to 1, or sigma_hat")]
SamplerName = Annotated[
    str | None, typer.Option(help="ddim, ancestral, dpmpp_2m, dpmpp_3m, unipc, heun, euler, sde, lcm")
]
Guidance = Annotated[
    str | None, typer.Option(help="1 is none; or of each condition apart, in their order: text=3,label=1.5")
]
GuideWith = Annotated[
    str | None, typer.Option(help="a smaller run, or an earlier checkpoint, that guidance leads away from")
]
Images = Annotated[
    str | None, typer.Option(help="of an autoencoder: prior decodes latents of N(0, I), reconstructions gives back")
]
Ema = Annotated[int | None, typer.Option(min=0, help="EMA profile")]
Sigma = Annotated[
    float | None, typer.Option(help="σ_rel of an average made of snapshots, of a run with power-function averages")
]
Raw = Annotated[bool, typer.Option("--raw", help="the raw weights instead of an EMA")]
Step = Annotated[int | None, typer.Option(min=0, help="the checkpoint to take; default: the newest")]
NumSamples = Annotated[int | None, typer.Option("--n", "-n", min=2, help="how many samples; default: eval.num_samples")]
Metrics = Annotated[
    str | None,
    typer.Option(
        help="fd,fd_infinity,kid,precision,recall,density,coverage,memorisation,is,bpd,nats_per_dim_latent,bpd_ode,"
        "nats_per_dim_latent_ode,straightness,clip_score,agreement"
    ),
]
ClipModel = Annotated[str | None, typer.Option(help="the folder of a CLIPModel, for clip_score")]
Classifier = Annotated[str | None, typer.Option(help="a TorchScript file with scores of the classes, for agreement")]
Features = Annotated[str | None, typer.Option(help=FEATURES_HELP)]
Bootstrap = Annotated[int | None, typer.Option(min=0, help="resamplings for an interval of fd; 0: none")]
BpdClip = Annotated[bool | None, typer.Option(help="hold x_0 within [−1, 1] in bpd, as published figures do")]
Resize = Annotated[
    str | None, typer.Option(help="of Inception's images: clean, or tensorflow as published ImageNet figures")
]
Weights = Annotated[str | None, typer.Option(help="Inception's weight file, or its folder; of dinov2 the folder")]


def with_eval(config, chosen: dict, raw: bool):
    """The config with other `eval` settings, None leaving one as it is; validated like the file's own.

    chosen: by a key of `eval`, or as the option is called: n, and metrics as one text.
    """
    from dtrain import config as configuration
    from dtrain.config.guidance import chosen_over
    from dtrain.evaluation.requirements import check_guidance

    chosen = {"num_samples" if k == "n" else k: v for k, v in chosen.items() if v is not None}
    if (sigma := chosen.pop("sigma", None)) is not None:
        if raw or "ema" in chosen:
            raise UserError(f"--sigma {sigma} is an average of its own; leave out --{'raw' if raw else 'ema'}")
        chosen["ema"] = {"sigma_rel": sigma}
    if "metrics" in chosen:
        chosen["metrics"] = chosen["metrics"].split(",")
    tree = config.model_dump(mode="json")
    tree["eval"] = chosen_over(tree["eval"], chosen | ({"ema": None} if raw else {}))
    config = configuration.validate(tree, "the command line", [f"eval.{k}" for k in chosen])
    check_guidance(config)
    return config


def this_command() -> str:
    """`dtrain …` as it was typed, without secrets; a launcher's options are known to the launcher alone."""
    if Path(sys.argv[0]).name != "dtrain":
        return "the same command"
    return shlex.join(["dtrain", *map(shown_argument, sys.argv[1:])])


def values(text: str) -> list:
    """`5,10` as numbers; what is no number stays a word for its key to judge."""
    import yaml

    try:
        found = [yaml.safe_load(part) for part in text.split(",")]
        if None in found:
            raise yaml.YAMLError
        return found
    except yaml.YAMLError:
        raise UserError(f"{text!r} is not a list of values such as 5,10,20") from None
