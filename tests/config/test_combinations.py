"""The README's tables of what can be combined, held cell by cell to what a config accepts and refuses."""

import re
from pathlib import Path

import pytest
import yaml

from dtrain.config import load
from dtrain.errors import UserError

ROOT = Path(__file__).parents[2]
BASE = ROOT / "configs" / "digits-dit.yaml"
CLASSES = "num_classes: 10"
# Column → what a config says for it, beside the digits' own data. A network replaces the whole section.
COLUMNS = {
    **{name: {"diffusion.process": name} for name in ("gaussian", "flow", "meanflow", "edm", "vdm")},
    "ddgan": {"diffusion.process": "ddgan", "eval.steps": "4"},
    "dit": {},
    "mmdit": {
        "model": "{name: mmdit, depth: 1, width: 32, heads: 2, patch: 2, num_classes: 10}",
        "conditions.text": "{}",
    },
    "unet": {"model": "{name: unet, width: 16, multipliers: [1, 2], attention: [4], num_classes: 10}"},
}
SETTING = re.compile(r"`([a-z_]+(?:\.[a-z_]+)+): ([^`]+)`")


def tables():
    """(column, settings of the row, the cell) of every cell."""
    (section,) = re.findall(r"\n## What can be combined\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.DOTALL)
    columns = []
    for line in section.splitlines():
        if not line.startswith("|"):
            continue
        first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if first.startswith("with"):
            columns = [cell.strip("`") for cell in cells]
        elif not first.startswith("-"):
            assert len(cells) == len(columns), line
            yield from ((column, first, cell) for column, cell in zip(columns, cells, strict=True))


CELLS = list(tables())


def loaded(folder, column, *texts):
    settings = COLUMNS[column] | {key: value for text in texts for key, value in SETTING.findall(text)}
    if "first_stage.source" in settings:  # what the folder's config.json would say
        settings |= {"first_stage.latent_channels": "4", "first_stage.downscale": "2"}
    base = folder / "base.yaml"
    tree = yaml.safe_load(BASE.read_text())
    model = settings.pop("model", None)
    if model:
        tree["model"] = yaml.safe_load(model)
    base.write_text(yaml.safe_dump(tree))
    return load(base, [f"{key}={value}" for key, value in settings.items()])


@pytest.mark.parametrize(("column", "row", "cell"), CELLS, ids=lambda text: re.sub(r"[^\w.: ]", "", text)[:60])
def test_the_config_accepts_and_refuses_what_the_table_says(tmp_path, column, row, cell):
    assert SETTING.findall(row), f"{row} names no setting"
    if cell == "yes":
        loaded(tmp_path, column, row)
        return
    with pytest.raises(UserError) as error:
        loaded(tmp_path, column, row)
    assert "\n" not in str(error.value)
    if cell != "–":
        assert cell.startswith("with `"), cell
        loaded(tmp_path, column, row, cell)


def test_every_process_sampler_and_network_is_in_the_tables():
    from dtrain.config import SAMPLERS

    rows = " ".join(row for _, row, _ in CELLS)
    assert {column for column, _, _ in CELLS} == COLUMNS.keys()
    assert all(f"`eval.sampler: {name}`" in rows for name in SAMPLERS)
