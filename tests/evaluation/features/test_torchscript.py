"""A TorchScript file is a program: one that could touch files is refused before any of it runs."""

import hashlib
import io
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from dtrain.config import load
from dtrain.errors import UserError
from dtrain.evaluation.features.networks import UserNetwork
from dtrain.evaluation.features.torchscript import read_program
from dtrain.evaluation.requirements import known_features
from tests.digits import CONFIG
from tests.evaluation.features.networks import Means, saved


class Restored(torch.nn.Module):
    """Code that runs while the file is opened, as quantized networks have it; this one only computes."""

    def __init__(self):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(3))
        self.size = 8

    @torch.jit.export
    def __getstate__(self):
        return self.shift, self.training, self.size

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool, int]):
        self.shift = state[0] + 1
        self.training = state[1]
        self.size = state[2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) + self.shift


def rewritten(path: Path, old: str, new: str) -> Path:
    """The file with its code changed, as whoever means harm would write it by hand."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist() if not name.endswith(".debug_pkl")}
    code = next(name for name in parts if name.endswith(".py"))
    assert old in parts[code].decode()
    parts[code] = parts[code].decode().replace(old, new).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return path


# What stands in the code of `Means.forward` → what it does to a file.
HARM = {
    "a function": 'torch.save(x, "{}")',
    "an operator": 'ops.aten.save(x, "{}")',
    "a method of a tensor": 'x.save("{}")',
    "by its name": 'getattr(torch, "save")(x, "{}")',
    "over two lines": 'torch.\\\n    save(x, "{}")',
    "a mapped file": '_0 = torch.from_file("{}", True, 4)',
    "another library": 'ops.image.write_file("{}", x)',
    "another library by another name": 'o = ops\n    o.image.write_file("{}", x)',
    "a library of classes by another name": 't = __torch__.torch\n    t.classes.image.Writer("{}").save(x)',
}


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM)
def test_code_that_reaches_files_is_not_run_and_check_says_so(tmp_path, harm):
    victim = tmp_path / "victim"
    path = rewritten(saved(Means(), tmp_path / "net.pt"), "    return", f"    {harm.format(victim)}\n    return")
    with pytest.raises(
        UserError, match=r"net\.pt is not run: its code uses .*(save|from_file|image|ops|__torch__)"
    ) as refused:
        UserNetwork(str(path))
    assert "\n" not in str(refused.value)
    config = load(CONFIG, [f"eval.features={path}"])
    with pytest.raises(UserError, match="is not run"):
        known_features(config.eval, config.data)
    assert not victim.exists()


def test_code_that_runs_while_a_file_is_opened_is_looked_at_before(tmp_path):
    victim = tmp_path / "victim"
    path = saved(Restored(), tmp_path / "net.pt")
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    assert UserNetwork(str(path))(pixels).tolist() == [[1, 1, 1]]  # it ran
    rewritten(path, "    self.training = ", f'    torch.save((state)[0], "{victim}")\n    self.training = ')
    with pytest.raises(UserError, match=r"is not run: its code uses torch\.save"):
        UserNetwork(str(path))
    assert not victim.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.load(path)
    assert victim.exists()  # what merely opening it does


def test_names_and_texts_that_only_look_alike_are_run(tmp_path):
    path = saved(Means(), tmp_path / "saved-from_file.pt")
    rewritten(path, "    return", '    saved = "save(x)"\n    return')
    assert UserNetwork(str(path)).dimensions == 3


def test_a_config_pins_the_file_by_its_hash(tmp_path):
    path = saved(Means(), tmp_path / "net.pt")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    pinned = load(CONFIG, [f"eval.features={path}#sha256={digest}"]).eval.features
    network = UserNetwork(pinned)
    assert (network.name, network.fingerprint) == ("net", UserNetwork(str(path)).fingerprint)
    rewritten(path, "    return", "    y = 1\n    return")
    with pytest.raises(UserError, match=rf"has the sha256 \w{{64}}, and eval.features pins {digest}: it is another"):
        UserNetwork(pinned)
    with pytest.raises(UserError, match=r"pins no hash: after #sha256= come 64 hexadecimal digits"):
        load(CONFIG, [f"eval.features={path}#sha256=abc"])


def loaded(data: bytes) -> None:
    """As torch opens it by itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.load(io.BytesIO(data))


def harmful(path: Path, victim: Path) -> dict[str, bytes]:
    """The members of a file that writes another while it is opened."""
    saved(Restored(), path)
    rewritten(path, "    self.training = ", f'    torch.save((state)[0], "{victim}")\n    self.training = ')
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("other_case", [False, True])
def test_an_archive_with_two_members_of_one_name_is_refused(tmp_path, other_case):
    """Readers take the one or the other of them."""
    victim = tmp_path / "victim"
    harm, harmless = harmful(tmp_path / "harm.pt", victim), saved(Restored(), tmp_path / "net.pt")
    code = next(name for name in harm if name.endswith(".py"))
    with zipfile.ZipFile(harmless) as archive:
        innocent = archive.read(next(name for name in archive.namelist() if name.endswith(".py")))
    with zipfile.ZipFile(tmp_path / "net.pt", "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for name, data in harm.items():
            archive.writestr(name, data)
        archive.writestr(code.upper() if other_case else code, innocent)
    with pytest.raises(UserError, match=r"net\.pt is not run: (two of its members have the same name|.*torch\.save)"):
        UserNetwork(str(tmp_path / "net.pt"))
    assert not victim.exists()


def test_torch_opens_the_members_that_were_looked_at_and_no_others(tmp_path):
    """Two whole archives in a row, of which Python's reader and torch's may take another: only one is ever run."""
    victim = tmp_path / "victim"
    harmful(tmp_path / "harm.pt", victim)
    saved(Restored(), tmp_path / "good.pt")
    one, two = (tmp_path / "harm.pt").read_bytes(), (tmp_path / "good.pt").read_bytes()
    program = tmp_path / "net.pt"
    program.write_bytes(one + two)
    given = read_program(str(program))
    with zipfile.ZipFile(program) as seen, zipfile.ZipFile(io.BytesIO(given.data)) as handed:
        assert {n: handed.read(n) for n in handed.namelist()} == {n: seen.read(n) for n in seen.namelist()}
        # Nothing of the file is in it but these, each as it is, uncompressed.
        assert all(part.compress_type == zipfile.ZIP_STORED for part in handed.infolist())
    assert str(victim).encode() in program.read_bytes()
    assert str(victim).encode() not in given.data
    loaded(given.data)
    assert not victim.exists()


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.save = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.save(x)


class Named(torch.nn.Module):
    """Submodules whose names are words of the check."""

    def __init__(self):
        super().__init__()
        self.size = 8
        self.classes, self.load, self.block = torch.nn.Linear(3, 4), torch.nn.Linear(4, 4), Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block.save(self.block(self.load(self.classes(x.mean((2, 3))))))


def test_submodules_may_be_called_classes_load_and_save(tmp_path):
    network = Named()
    path = saved(network, tmp_path / "net.pt")
    pixels = torch.arange(2 * 3 * 64, dtype=torch.uint8).reshape(2, 3, 8, 8)
    assert torch.allclose(UserNetwork(str(path))(pixels), network(pixels.float()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "harm", ['block.load(x, "{}")', 'load = x\n    load.save("{}")', 's = x\n    s.load("{}")', 'x.load("{}")']
)
def test_a_submodule_called_load_excuses_no_other_value(tmp_path, harm):
    path = rewritten(
        saved(Named(), tmp_path / "net.pt"), "    load = self.load\n", f"    {harm}\n    load = self.load\n"
    )
    with pytest.raises(UserError, match="is not run: its code uses"):
        UserNetwork(str(path))
