"""What documentation names exists: files, config keys, error messages."""

import ast
import re
import tarfile
from functools import cache
from typing import get_args

import numpy as np
import pytest
import yaml
from PIL import Image
from pydantic import BaseModel

from dtrain.config import Config
from tests.printed import PAGES, ROOT, inline

SECTIONS = "run|data|model|diffusion|optim|ema|deepspeed|train|eval|tracking"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_names_to_config_keys(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)  # code has brackets too
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    named = [re.match(rf"({SECTIONS})\.([a-z_.]+)(?=[=:]|$)", code) for code in inline(text)]
    files = (".py", ".yaml", ".safetensors")
    wrong = [m[0] for m in named if m and m[0] not in keys() | {"data.json"} and not m[0].endswith(files)]
    assert wrong == [], "no such config keys"


@cache
def keys() -> set[str]:
    def below(model: type[BaseModel], prefix: str) -> set[str]:
        found = set()
        for name, field in model.model_fields.items():
            found.add(prefix + name)
            for part in sections(field.annotation):
                found |= below(part, f"{prefix}{name}.")
        return found

    def sections(annotation) -> list[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return [annotation]
        return [found for part in get_args(annotation) for found in sections(part)]

    return below(Config, "")


@cache
def messages() -> list[str]:
    """Every text in the package, `…` for each value that it is filled with."""
    found = []
    for path in (ROOT / "dtrain").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


# What the shell, Python, DeepSpeed, torch, diffusers and MLflow say, and files.
OF_OTHERS = (
    "command not found",
    "ensurepip",
    "Setting accelerator to CPU",
    "CUDA out of memory",
    "outcome.json",
    "train-JOB",
    "not again",
    "KeyboardInterrupt",
    "accelerate",
    "No image logged",
)


def troubles() -> list[str]:
    """The messages in the headings of the page; one that holds a backtick stands between two of them."""
    text = (ROOT / "docs/troubleshooting.md").read_text()
    headings = re.findall(r"^### (.*)$", text, flags=re.MULTILINE)
    found = [message for heading in headings for _, message in re.findall(r"(``?)(.+?)\1(?!`)", heading)]
    return [message for message in found if not any(words in message for words in OF_OTHERS)]


@pytest.mark.parametrize("trouble", troubles())
def test_messages_in_troubleshooting_are_those_that_are_printed(trouble):
    pieces = [re.escape(piece.strip(" ")) for piece in trouble.strip().split("…")]
    pattern = re.compile(".*?".join(pieces), flags=re.DOTALL)
    assert any(pattern.search(message) for message in messages()), f"nothing prints {trouble!r}"


def test_the_citation_has_what_the_format_asks_for():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text()


def test_the_training_digits_have_the_distance_that_the_pages_say(digits):
    """Computed by NumPy alone, which knows nothing of this project."""

    def moments(split: str) -> tuple[np.ndarray, np.ndarray]:
        found = []
        for shard in sorted((digits / split).glob("*.tar")):
            with tarfile.open(shard) as tar:
                found += [np.asarray(Image.open(tar.extractfile(m))).ravel() for m in tar if m.name.endswith(".png")]
        images = np.stack(found) / 127.5 - 1
        return images.mean(0), np.cov(images, rowvar=False)

    (mean, covariance), (other_mean, other_covariance) = moments("train"), moments("holdout")
    roots = np.sqrt(np.linalg.eigvals(covariance @ other_covariance).real.clip(0))
    distance = ((mean - other_mean) ** 2).sum() + np.trace(covariance + other_covariance) - 2 * roots.sum()
    assert "0.569" in (ROOT / "configs/README.md").read_text()
    assert distance == pytest.approx(0.569, abs=5e-4)
