"""Without a network: words and latents are encoded, trained on, evaluated and asked for out of local folders alone."""

import ipaddress
import socket
import sys

import pytest
import torch

from tests.command_line import command
from tests.conditions.encoder_folders import written
from tests.encoding.caches import captioned
from tests.first_stage.folders import latent, save_kl
from tests.ranks import run_ranks

pytest.importorskip("transformers")
pytest.importorskip("diffusers")

REACHING = ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname")


def is_here(host) -> bool:
    """Whether this machine's own ranks may be meant."""
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def without_network() -> list[str]:
    """Refuses, from here to the end of the process, whatever leads out of this machine, and lists what was tried."""
    tried: list[str] = []

    def hook(event, arguments):
        if event not in REACHING:
            return
        address = arguments[1] if event in ("socket.connect", "socket.sendto") else arguments[0]
        if isinstance(address, str | bytes) and event == "socket.connect":
            return  # a socket of this machine's file system
        host = address[0] if isinstance(address, tuple) else address
        host = host.decode() if isinstance(host, bytes) else host
        if not is_here(host):
            tried.append(f"{event} {host}")
            raise OSError("there is no network")

    sys.addaudithook(hook)
    return tried


def gapped(*arguments):
    """(exit code, what it said, what it tried to reach) of `dtrain …` without a network."""
    tried = without_network()
    return *command(*arguments), tried


def reaching():
    tried, met = without_network(), 0
    for reach in (
        lambda: socket.create_connection(("192.0.2.1", 80), 1),
        lambda: socket.getaddrinfo("huggingface.co", 443),
        lambda: __import__("urllib.request").request.urlopen("https://huggingface.co", timeout=1),
    ):
        try:
            reach()
        except OSError as e:
            met += "there is no network" in str(e)
    return met, len(tried)


class Classifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.size = 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((1, 2, 3))[:, None] + torch.arange(10)


def test_what_leads_out_of_the_machine_is_refused():
    assert run_ranks(reaching, 1) == [(3, 3)]


def test_words_are_encoded_trained_on_evaluated_and_asked_for_without_a_network(tmp_path):
    def done(*arguments):
        ((code, said, tried),) = run_ranks(gapped, 1, *arguments)
        assert tried == []
        assert code == 0, said
        return said

    t5, clip, vae = written("t5", tmp_path / "t5"), written("clip model", tmp_path / "clip"), tmp_path / "vae"
    save_kl(vae, scaling_factor=0.8)
    torch.jit.script(Classifier()).save(str(tmp_path / "classes.pt"))
    captioned(tmp_path / "train", 14)
    captioned(tmp_path / "holdout", 12, first=42)
    done(
        "encode", tmp_path / "train", tmp_path / "cache", "--first-stage", vae, "--text", t5, "--size", 8, "--length", 8
    )
    config = latent(
        *(tmp_path, tmp_path, vae, f"data.shards={tmp_path / 'cache'}", "first_stage.cached=true", "train.steps=2"),
        *(f"conditions.text.encoder={t5}", "conditions.text.length=8", "conditions.text.cached=float16"),
        *(
            "data.streams=1",
            "data.batch_size=4",
            "eval.every=2",
            "eval.num_samples=8",
            "eval.steps=2",
            "eval.guidance=2",
        ),
        *("eval.features=pixels", "eval.metrics=[fd,clip_score,agreement]", f"eval.clip_model={clip}"),
        f"eval.classifier={tmp_path / 'classes.pt'}",
    )
    (tmp_path / "text.yaml").write_text(config.dump())
    assert "clip_score" in done("train", tmp_path / "text.yaml")
    assert "agreement" in done("evaluate", config.run.path, "--n", 12)
    done("sample", config.run.path, "--prompt", "a nine", "--steps", 2, "--out", tmp_path / "nine.png")
    assert (tmp_path / "nine.png").exists()

    for folder, name, words in (
        (clip, "preprocessor_config.json", ("evaluate", config.run.path)),
        (t5, "config.json", ("sample", config.run.path, "--prompt", "two", "--out", tmp_path / "two.png")),
        (vae, "diffusion_pytorch_model.safetensors", ("evaluate", config.run.path)),
    ):
        (folder / name).rename(tmp_path / name)
        ((code, said, tried),) = run_ranks(gapped, 1, *words)
        assert (code, tried) == (2, [])
        (line,) = said.strip().splitlines()
        assert name in line
        assert "copy" in line or "save" in line
        (tmp_path / name).rename(folder / name)
