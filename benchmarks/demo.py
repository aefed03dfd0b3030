"""Does the digits run draw digits? Its final Fréchet distance, and whether a classifier reads what was asked for.

    python benchmarks/demo.py [RUN] [--picture docs/digits.png]    after `make demo`; exit code 1 for a missed bar

The 3-nearest-neighbour classifier is fitted on all real digits; it reads 1,000 samples drawn with guidance 2.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from dtrain.run import RunDirectory
from dtrain.tracking.journal import read

FD_BAR, AGREEMENT_BAR, MINUTES_BAR = 0.9, 0.98, 7.0


def picture(run: RunDirectory, lines: list[dict], out: Path) -> None:
    """The loss, the Fréchet curve and the last sample grid, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    train = [(line["step"], line["metrics"]["loss"]) for line in lines if line["event"] == "train"]
    evals = [line for line in lines if line["event"] == "eval"]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.4), width_ratios=(1, 1, 1.2))
    left.plot(*zip(*train, strict=True), linewidth=0.8, color="#4477aa")
    left.set(title="loss", xlabel="step", yscale="log")
    curve = [(line["step"], line["metrics"]["fd_pixels"]) for line in evals]
    middle.plot(*zip(*curve, strict=True), marker="o", color="#cc3311")
    middle.set(title="fd_pixels of the EMA, 2,000 DDIM-50 samples", xlabel="step", yscale="log")
    for axis in (left, middle):
        axis.grid(alpha=0.3)
    right.imshow(pyplot.imread(run.path / evals[-1]["context"]["artifact"]), cmap="gray")
    right.set_title("samples by class")
    right.axis("off")
    figure.tight_layout()
    figure.savefig(out, dpi=90)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("run", nargs="?", default="digits")
    arguments.add_argument("--picture", type=Path)
    given = arguments.parse_args()
    run = RunDirectory.find(given.run)
    lines = read(run.journal_file)
    if given.picture:
        picture(run, lines, given.picture)
    final = [line for line in lines if line["event"] == "eval"][-1]
    minutes = (final["time"] - next(line["time"] for line in lines if line["event"] == "attempt")) / 60
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "samples.npz"
        subprocess.run(["dtrain", "sample", run.path, "--n", "1000", "--guidance", "2", "--out", out], check=True)
        with np.load(out) as samples:
            images, labels = samples["images"].reshape(1000, 64), samples["labels"]
    real = load_digits()
    classifier = KNeighborsClassifier(3).fit(np.round(real.data * (255 / 16)), real.target)
    agreement = (classifier.predict(images) == labels).mean()
    rows = [
        (
            "fd_pixels, 2,000 samples",
            final["metrics"]["fd_pixels"],
            f"<= {FD_BAR}",
            final["metrics"]["fd_pixels"] <= FD_BAR,
        ),
        ("label read by 3-NN", agreement, f">= {AGREEMENT_BAR}", agreement >= AGREEMENT_BAR),
        ("minutes to train and evaluate", minutes, f"<= {MINUTES_BAR}", minutes <= MINUTES_BAR),
    ]
    for name, value, bar, passed in rows:
        print(f"{name:32} {value:8.4f}  {bar:8} {'ok' if passed else 'MISSED'}")
    return 0 if all(passed for *_, passed in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
