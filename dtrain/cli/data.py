"""`dtrain pack | index | verify`, and `dtrain data audit | bench`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from dtrain.cli.arguments import Overrides, RunName, this_command
from dtrain.cli.progress import progress
from dtrain.errors import DAMAGED
from dtrain.interrupt import ctrl_c
from dtrain.terminal import printable, say, tell


def pack(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="a folder of pictures, or of class folders; a .parquet file, or a folder of them; an .npz; "
            "a manifest.json; sklearn:digits or digit-pairs; torchvision:cifar10, cifar100, mnist, fashionmnist, "
            "kmnist, svhn, stl10 or usps",
        ),
    ],
    destination: Annotated[Path, typer.Argument(metavar="DEST")],
    holdout: Annotated[int, typer.Option(min=0, help="samples set apart for evaluation")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="of the shuffle and the split")] = 0,
    shard_samples: Annotated[int | None, typer.Option(min=1, help="samples a shard; default: at most 1,000")] = None,
    shard_bytes: Annotated[int | None, typer.Option(min=1, help="end a shard that has so many bytes")] = None,
    format: Annotated[str | None, typer.Option(help="png, jpeg or webp; default: files as they are")] = None,
    split: Annotated[str | None, typer.Option(help="which of several to take, such as train")] = None,
    label_column: Annotated[str | None, typer.Option(help="of metadata.jsonl, metadata.csv or Parquet files")] = None,
    image_column: Annotated[str | None, typer.Option(help="of Parquet files with several")] = None,
    captions: Annotated[bool, typer.Option("--captions", help="with the .txt beside each picture of its name")] = False,
    caption_column: Annotated[str | None, typer.Option(help="of metadata.jsonl or metadata.csv")] = None,
    caption_template: Annotated[
        str | None, typer.Option(help='captions of the class, such as "a photo of one {class}"')
    ] = None,
    class_names: Annotated[str | None, typer.Option(help="of a source without them, with commas between")] = None,
    root: Annotated[str | None, typer.Option(help="folder of torchvision's files; default: data/torchvision")] = None,
    download: Annotated[bool, typer.Option("--download", help="fetch torchvision's files into its root")] = False,
) -> None:
    """Make WebDataset shards with manifests: DEST/train and, with --holdout, DEST/holdout.

    Pictures that training would refuse are left out: DEST/left-out.tsv says which and why.
    """
    from dtrain.data.pack.pack import pack as run
    from dtrain.data.pack.source import Choice

    ctrl_c.kept(f"shards that are whole are kept; go on with: {this_command()}")
    choice = Choice(split, label_column, image_column, root, download, captions, caption_column)
    choice = replace(choice, caption_template=caption_template, class_names=class_names)
    with progress("packing") as on_sample:
        packed = run(source, destination, holdout, seed, shard_samples, shard_bytes, format, on_sample, choice=choice)
    say(packed.report)


def encode(
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help="a folder with a manifest.json, or a manifest")],
    destination: Annotated[str, typer.Argument(metavar="DEST", help="a folder; with --statistics-only a .json file")],
    first_stage: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="the folder of a diffusers AutoencoderKL or AutoencoderTiny")
    ] = None,
    text: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="of a text encoder of transformers: CLIP, T5 or BERT")
    ] = None,
    size: Annotated[int, typer.Option(min=1, help="data.image_size of the trainings to come")] = 256,
    mirrors: Annotated[bool, typer.Option("--mirrors", help="of the mirrored pictures too, for data.flip")] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; default: latents float32, words float16")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="fp32 or bf16, as first_stage.precision, conditions.NAME.precision")
    ] = ("fp32"),
    block: Annotated[
        int, typer.Option(min=1, help="encoded together, as first_stage.block, conditions.NAME.block")
    ] = 1,
    scaling: Annotated[str, typer.Option(help="bicubic or adm, as data.scaling")] = "bicubic",
    statistics_only: Annotated[
        bool, typer.Option("--statistics-only", help="for first_stage.statistics, without a cache")
    ] = False,
    name: Annotated[str, typer.Option(help="of the condition that reads the words: conditions.NAME")] = "text",
    caption: Annotated[str, typer.Option(help="where captions are, as conditions.NAME.field")] = "txt",
    length: Annotated[int, typer.Option(min=2, help="tokens of a caption, as conditions.NAME.length")] = 64,
) -> None:
    """Make a cache: shards of what an autoencoder says of each picture, for first_stage.cached, of what a text encoder
    says of each caption, for conditions.NAME.cached, or of both.

    Alone, or on every rank a launcher started. Labels and other files of the samples are copied.
    """
    from dtrain import distributed

    ctrl_c.kept(f"shards that are whole are kept; go on with: {this_command()}")
    distributed.prepare()
    distributed.initialize()
    from dtrain.encoding.captions import CaptionRequest
    from dtrain.encoding.encode import Request
    from dtrain.encoding.encode import encode as run
    from dtrain.encoding.pictures import PictureRequest

    how = {"precision": precision, "block": block}
    latents = first_stage and PictureRequest(first_stage, size, mirrors, dtype or "float32", scaling=scaling, **how)
    words = text and CaptionRequest(text, name, caption, length, dtype or "float16", **how)
    with progress("encoding") as on_sample:
        done = run(shards, destination, Request(latents or None, words or None, statistics_only), on_sample, tell)
    if distributed.rank() == 0:
        say(printable(done))
    distributed.finalize()


def index(
    shards: Annotated[
        list[str],
        typer.Argument(metavar="SHARDS...", help="folders of .tar shards, globs, brace patterns, @lists, or URLs"),
    ],
    out: Annotated[Path | None, typer.Option(help="the manifest to write; default: manifest.json beside them")] = None,
) -> None:
    """Write the manifest of shards that exist."""
    from dtrain.data.shards.indexing import index as run

    manifest = run(shards, out)
    fields = ", ".join(manifest.fields)
    say(printable(f"{manifest.path}: {manifest.samples:,} samples in {len(manifest.shards)} shards ({fields})"))
    for remark in manifest.remarks:
        say(printable(remark))


def verify(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="a manifest.json, or the folder it is in")],
    shards: Annotated[str | None, typer.Option(help="their folder or URL; default: beside the manifest")] = None,
) -> None:
    """Compare every byte of every shard with the manifest; exit code 1 where one is damaged, each is named."""
    from dtrain.data.shards.manifest import load
    from dtrain.data.shards.progress import bytes_bar
    from dtrain.data.shards.verify import verify as run

    found = load(manifest / "manifest.json" if manifest.is_dir() else manifest)
    with bytes_bar(f"verifying {len(found.shards):,} shards", sum(s.bytes for s in found.shards)) as progress:
        problems = run(found, shards or found.path.parent, progress)
    for place, problem in problems.items():
        say(printable(f"{place} {problem}"))
    say(f"{found.path}: {len(problems):,} of {len(found.shards):,} shards damaged")
    if problems:
        raise typer.Exit(DAMAGED)


data = typer.Typer(help="Prove what was trained on, and measure how fast data comes.", no_args_is_help=False)


@data.command("audit")
def audit_data(run: RunName) -> None:
    """Replay the order of what the journal says was trained; exit code 1 where it contradicts the order."""
    from dtrain.run import RunDirectory
    from dtrain.training.audit import audit

    found = audit(RunDirectory.find(run))
    say(found)
    if found.problems:
        raise typer.Exit(DAMAGED)


@data.command("bench")
def bench_data(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="a YAML file, see configs/")],
    overrides: Overrides = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="for all stages together")] = 10.0,
) -> None:
    """Images a second of each stage of one loader process, and which one limits."""
    from dtrain import config as configuration
    from dtrain.data.bench import bench, report

    say(report(bench(configuration.load(config, overrides or []), seconds)))
