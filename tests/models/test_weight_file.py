"""Weights as other people's trainings leave them: taken by the names they have there, or refused with what to do."""

import argparse
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dtrain.errors import UserError
from dtrain.models.published import load_published, published
from dtrain.models.weight_file import read_weights
from tests.models.small import small

RAW, AVERAGED = small(seed=1), small(seed=2)


def as_saved_by_dit(**more) -> dict:
    """What the published training script writes: its options are a Namespace."""
    optimizer = torch.optim.AdamW(RAW.parameters())
    options = argparse.Namespace(model="DiT-XL/2", image_size=256, ckpt=None)
    sets = {"model": RAW.state_dict(), "ema": AVERAGED.state_dict(), "opt": optimizer.state_dict(), "args": options}
    return sets | more


def begins_as(path, model, which=None) -> bool:
    loaded = load_published(small(seed=0), path, which)
    return all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.ckpt"])
@pytest.mark.parametrize("archive", [True, False], ids=["archive", "legacy"])
def test_files_of_any_suffix_are_taken_in_both_of_torchs_formats(tmp_path, name, archive):
    torch.save(as_saved_by_dit(), tmp_path / name, _use_new_zipfile_serialization=archive)
    assert begins_as(tmp_path / name, AVERAGED, "ema")
    assert begins_as(tmp_path / name, RAW, "model")
    torch.save(RAW.state_dict(), tmp_path / name, _use_new_zipfile_serialization=archive)
    assert begins_as(tmp_path / name, RAW)


def compiled_blocks() -> nn.Module:
    model = small(seed=1)
    model.blocks = nn.ModuleList(torch.compile(block) for block in model.blocks)
    return model


WRAPPED = {
    "DataParallel": lambda: nn.DataParallel(RAW).state_dict(),
    "torch.compile": lambda: torch.compile(RAW).state_dict(),
    "compiled blocks": lambda: compiled_blocks().state_dict(),
    "compiled in DataParallel": lambda: nn.DataParallel(torch.compile(RAW)).state_dict(),
    "DataParallel compiled": lambda: torch.compile(nn.DataParallel(RAW)).state_dict(),
    "AveragedModel": lambda: AveragedModel(RAW).state_dict(),
    "Lightning": lambda: {"state_dict": {f"model.{n}": v for n, v in RAW.state_dict().items()}, "epoch": 3},
    "DeepSpeed": lambda: {"module": RAW.state_dict(), "global_steps": 7, "ds_version": "0.19"},
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_what_wrappers_put_before_names_is_taken_away(tmp_path, wrapper):
    state = WRAPPED[wrapper]()
    assert {"x_embedder.proj.weight", "blocks.0.attn.qkv.weight"} - state.keys()
    torch.save(state, tmp_path / "w.pt")
    assert begins_as(tmp_path / "w.pt", RAW)


def test_a_safetensors_file_keeps_two_sets_in_one_by_the_beginnings_of_their_names(tmp_path):
    both = {f"ema.{n}": v for n, v in AVERAGED.state_dict().items()}
    both |= {f"model.module.{n}": v for n, v in RAW.state_dict().items()}
    save_file(both, tmp_path / "w.safetensors")
    assert begins_as(tmp_path / "w.safetensors", AVERAGED, "ema")
    assert begins_as(tmp_path / "w.safetensors", RAW, "model")


REFUSED = {
    "two sets and no choice": (
        as_saved_by_dit,
        None,
        r"holds averaged weights, `ema`, and raw ones, `model`; choose: ",
    ),
    "one set, asked for an average": (RAW.state_dict, "ema", "holds one set of weights, .*leave run.init_weights out"),
    "only an average": (lambda: {"ema": AVERAGED.state_dict()}, "model", "no weights of the kind model, only ema; lea"),
    "an optimizer": (
        lambda: {"opt": torch.optim.Adam(RAW.parameters()).state_dict()},
        None,
        "it holds `opt`; save its",
    ),
    "nothing": (dict, None, "it holds nothing; save its weights alone"),
    "a list": (lambda: [torch.zeros(2)], None, "not a plain state dict of names and tensors; save its weights alone"),
    "integers": (
        lambda: {n: v.int() for n, v in RAW.state_dict().items()},
        None,
        r"holds torch.int32, not plain float",
    ),
    "twice": (
        lambda: RAW.state_dict() | torch.compile(RAW).state_dict(),
        None,
        "holds weights twice, with and without `_orig_mod.`",
    ),
    "diffusers' names": (
        lambda: {"transformer_blocks.0.attn1.to_q.weight": torch.zeros(2)},
        None,
        "those of diffusers",
    ),
    "a model": (
        lambda: RAW,
        None,
        r"holds more than tensors \(`dtrain.models.dit.DiT`\) and could run code; where you",
    ),
    "a promise of terabytes": (
        lambda: RAW.state_dict() | {"x_embedder.proj.weight": torch.zeros(1).expand(1 << 20, 1 << 20)},
        None,
        r"`x_embedder.proj.weight` has shape \(1048576, 1048576\) in",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_all_else_is_refused_in_one_line_with_what_to_do(tmp_path, case):
    content, which, message = REFUSED[case]
    torch.save(content(), tmp_path / "w.pt")
    with pytest.raises(UserError, match=message) as error:
        load_published(small(), tmp_path / "w.pt", which)
    assert "\n" not in str(error.value)


def test_only_averaged_or_only_raw_weights_need_no_choice(tmp_path):
    torch.save({"ema": AVERAGED.state_dict(), "step": 3}, tmp_path / "w.pt")
    assert begins_as(tmp_path / "w.pt", AVERAGED)
    assert begins_as(tmp_path / "w.pt", AVERAGED, "ema")


def test_an_archive_is_not_decompressed_and_a_program_is_named_one(tmp_path):
    torch.save(RAW.state_dict(), tmp_path / "w.pt")
    with (
        zipfile.ZipFile(tmp_path / "w.pt") as whole,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for part in whole.infolist():
            bomb.writestr(part.filename, whole.read(part))
        bomb.writestr("archive/data/999", bytes(1 << 24))
    with pytest.raises(UserError, match=r"is a compressed archive, which torch.save does not write"):
        read_weights(tmp_path / "bomb.pt")
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "program.pt"))
    with pytest.raises(UserError, match="is a TorchScript program, not weights"):
        read_weights(tmp_path / "program.pt")


def test_looking_at_names_and_shapes_reads_no_weights_into_memory(tmp_path):
    """With the tensors mapped from the disk, the process' own memory does not grow by them."""
    import resource

    torch.save(as_saved_by_dit(more={"large": torch.zeros(1 << 26)}), tmp_path / "w.pt")  # 256 MB
    with torch.device("meta"):
        model = small()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert published(model, tmp_path / "w.pt", "ema").keys() == dict(RAW.named_parameters()).keys()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 17  # KiB
