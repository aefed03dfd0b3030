"""`dtrain config`."""

from typing import Annotated

import typer


def config(
    name: Annotated[str | None, typer.Argument(metavar="[SECTION|KEY]", help="such as data, train.steps or lr")] = None,
) -> None:
    """Print every key of the configuration: its type, its default and what it does."""
    from dtrain.config.keys import find, keys, sections

    found, about, section = find(name) if name else keys(), sections(), None
    for key in found:
        own = key.name.partition(".")[0].removesuffix("[]")
        if own != section and (name is None or name == own):
            print(f"{own}: {about[own]}\n" if section is None else f"\n{own}: {about[own]}\n")
        section = own
        print(key)
