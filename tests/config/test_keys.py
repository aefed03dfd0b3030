"""What `dtrain config` prints is what the sections are."""

import pytest
import yaml

from dtrain.config import Config, flat
from dtrain.config.keys import find, keys, sections
from dtrain.errors import UserError

SMALLEST = {
    "data": {"shards": "x", "image_size": 8, "batch_size": 1},
    "model": {"name": "dit", "size": "S/2"},
    "train": {"steps": 1},
}


def test_every_key_that_the_schema_has_says_in_one_line_what_it_does():
    described = keys()
    for key in described:
        assert key.about, key.name
        assert len(f"    {key.about}".splitlines()) == 1
        assert len(key.about) <= 116, key.name
    schema = Config.model_json_schema()  # pydantic's own walk through the sections
    chosen = {
        f"{name} {number}": section
        for name, field in schema["properties"].items()
        for number, section in enumerate(field.get("anyOf", [field]))
        if "properties" in section
    }
    listed = [(name, key) for name, section in (schema["$defs"] | chosen).items() for key in section["properties"]]
    # Of two models, a DiT and a UNet; of an autoencoder and of a flow.
    for twice in ("Adapt", "LPIPS", "EfficientNetLite0"):
        listed += [(twice, key) for key in schema["$defs"][twice]["properties"]]
    assert len(described) == len(listed)
    assert sorted(key.name.rpartition(".")[2] for key in described) == sorted(key for _, key in listed)
    assert list(sections()) == list(Config.model_fields)
    assert all(sections().values())


@pytest.mark.parametrize(
    ("model", "diffusion"),
    [
        ({"name": "dit", "size": "S/2"}, {}),
        ({"name": "unet", "width": 32, "attention": []}, {"process": "flow"}),
        ({"name": "dit", "size": "S/2"}, {"process": "edm"}),
    ],
)
def test_the_defaults_printed_are_those_that_a_config_gets(model, diffusion):
    given = SMALLEST | {"model": model, "diffusion": diffusion}
    resolved = flat(Config.model_validate(given).model_dump(mode="json"))
    known, compared = keys(), 0
    for name, value in resolved.items():
        section, _, last = name.partition(".")
        chosen = [k for k in known if k.name == name and k.of in (None, model["name"], diffusion.get("process"))]
        if section == "diffusion" and not diffusion:
            chosen = [k for k in known if k.name == name and k.of == "gaussian"]
        if not chosen or chosen[0].default in (None, "see below") or last in given.get(section, {}):
            continue
        if name == "eval.sampler" and diffusion:
            continue  # its default is the process' own, as its line says
        expected = yaml.safe_load(chosen[0].default)
        assert (yaml.safe_load(value) if isinstance(expected, list) else value) == expected, name
        compared += 1
    assert compared > 60


def test_keys_are_found_by_section_by_whole_name_and_by_last_name():
    assert {k.name for k in find("optim")} == {k.name for k in keys() if k.name.startswith("optim.")}
    assert [k.name for k in find("data.crop")] == ["data.crop"]
    assert [k.name for k in find("lr")] == ["diffusion.critic.lr", "objective.critic.lr", "optim.lr"]
    assert [(k.name, k.of) for k in find("num_classes")] == [
        ("model.num_classes", "dit"),
        ("model.num_classes", "mmdit"),
        ("model.num_classes", "unet"),
        ("model.num_classes", "kl_autoencoder"),
    ]
    assert str(find("data.crop")[0]) == (
        "data.crop: centre | random, default centre\n    random: scaled by up to 5/4 and cut anywhere, as ADM does"
    )
    with pytest.raises(UserError, match=r"there is no section or key `data.crp`; did you mean `data.crop`\?"):
        find("data.crp")
