"""What short trainings compute is what they computed before: bit for bit on the machine that wrote the figures."""

import json

import pytest
import yaml

from dtrain.config import Config, flat, validate
from dtrain.config.earlier import EARLIER
from tests.golden.__main__ import FIGURES, HERE, ROOT, figures_of
from tests.golden.compare import differences, furthest
from tests.golden.runner import CASES, complete
from tests.longer import longer

# On another machine bf16 products round at other places, and eight steps of Adam carry that on.
ELSEWHERE = {"fp32": 1e-5, "bf16_autocast": 5e-3, "bf16": 5e-3}

# A case of each config, stage and precision, and both numbers of ranks.
OFTEN = [
    *("dit-stage0-fp32-2", "dit-stage1-fp32-1", "dit-stage3-fp32-2", "dit-stage2-bf16-2", "dit-stage3-bf16_autocast-2"),
    *(
        "unet-stage3-fp32-2",
        "flow-stage1-fp32-2",
        "v-stage2-fp32-2",
        "hybrid-stage3-fp32-2",
        "importance-stage2-fp32-2",
    ),
    "x0-stage2-fp32-2",
    "mixture-stage2-fp32-2",
]


@pytest.fixture(scope="module")
def written():
    return json.loads(FIGURES.read_text())


@pytest.mark.parametrize("names", [OFTEN, longer(list(CASES))], ids=["each kind", "all"])
def test_a_golden_training_computes_what_it_computed_when_the_figures_were_written(written, names):
    assert written["cases"].keys() == CASES.keys()
    now, before = figures_of(ROOT, names), {name: written["cases"][name] for name in names}
    if now["machine"] == written["machine"]:
        assert differences(before, now["cases"]) == []
    for name in names:
        assert furthest(before[name], now["cases"][name]) < ELSEWHERE[CASES[name].precision], name


@pytest.mark.parametrize("config", sorted(HERE.glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_a_golden_config_writes_out_every_key_or_the_table_of_earlier_values_does(config):
    tree = complete(config)
    given, known = set(flat(tree)), set(flat(validate(tree, str(config)).model_dump(mode="json")))
    assert known - given == set(), "say in dtrain/config/earlier.py what runs did before this key existed"
    assert isinstance(validate(tree, str(config)), Config)


def test_the_golden_configs_give_no_key_a_default_silently(written):
    """A config that left a key out would follow a change of its default without a word."""
    for config in HERE.glob("configs/*.yaml"):
        tree = yaml.safe_load(config.read_text())
        assert not set(flat(tree)) - set(flat(complete(config)))
        assert set(flat(complete(config))) - set(flat(tree)) <= set(EARLIER)


def test_another_loss_norm_metric_or_hash_is_a_difference(written):
    name = "dit-stage2-fp32-2"
    for change in (
        lambda figures: figures["losses"].__setitem__(3, figures["losses"][3] * (1 + 1e-7)),
        lambda figures: figures["grad_norms"].__setitem__(7, 0.0),
        lambda figures: figures["evaluation"].update(fd_pixels=figures["evaluation"]["fd_pixels"] * (1 + 1e-11)),
        lambda figures: figures["evaluation"].pop("fd_pixels"),
        lambda figures: figures["hashes"].update(ema_1="0"),
        lambda figures: figures["losses"].pop(),
    ):
        other = json.loads(json.dumps(written["cases"]))
        change(other[name])
        (line,) = differences(written["cases"], other)
        assert line.startswith(name)
