"""A TorchScript file is a program: one that could touch files is refused before any of it runs."""

import hashlib
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from dtrain.config import load
from dtrain.errors import UserError
from dtrain.evaluation.networks import UserNetwork
from dtrain.evaluation.requirements import known_features
from tests.digits import CONFIG
from tests.evaluation.test_networks import Means, saved


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
}


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM)
def test_code_that_reaches_files_is_not_run_and_check_says_so(tmp_path, harm):
    victim = tmp_path / "victim"
    path = rewritten(saved(Means(), tmp_path / "net.pt"), "    return", f"    {harm.format(victim)}\n    return")
    with pytest.raises(UserError, match=r"net\.pt is not run: its code uses .*(save|from_file|image)") as refused:
        UserNetwork(str(path))
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="is not run"):
        known_features(load(CONFIG, [f"eval.features={path}"]))
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
