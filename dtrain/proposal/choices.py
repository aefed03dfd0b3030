"""What follows from the data and the machine. Each choice comes with the reason that is written beside it."""

from dataclasses import dataclass
from functools import cached_property

from dtrain.data import shared_memory
from dtrain.data.fields.survey import named
from dtrain.proposal.facts import Facts, Machine, features
from dtrain.proposal.source import DataSet
from dtrain.proposal.text import Line

SMALL = 16  # sides up to this are a few patches, and no picture for a network that was trained on photographs
MOST_STEPS = 100_000  # on GPUs; a first look, which a longer run improves on
LONG = 10_000  # steps from which a run is looked at more than five times
EPOCHS = 2000  # on GPUs
FEW = 5000  # pictures


def image_size(facts: Facts, machine: Machine) -> int:
    """The pictures' own side where they are small, else what this machine trains in an hour or a few."""
    side, most = facts.shorter_side, 64 if machine.gpus else 32
    if side >= most:
        return most
    return max(1, side - side % 4 if side >= 8 else side - side % 2)


@dataclass(frozen=True)
class Choices:
    """Lines of each section for images of `size` pixels."""

    data: DataSet
    facts: Facts
    machine: Machine
    size: int

    def sections(self, run: str) -> dict[str, list[Line]]:
        lines = {
            "run": [Line("name", run, f"runs/{run}; another name is another run")],
            "data": self._data(),
            "model": self._dit() if self.is_dit else self._unet(),
            "diffusion": self._diffusion(),
            "optim": self._optim(),
            "ema": [self._ema()],
            "deepspeed": self._deepspeed(),
            "train": [
                Line("steps", self.steps, "the first thing to raise"),
                Line("checkpoint_every", self.steps // (5 if self.steps < LONG else 20)),
            ],
            "eval": self._eval(),
        }
        return {name: own for name, own in lines.items() if own}

    @property
    def channels(self) -> int:
        return 1 if self.facts.survey.grey else 3

    @cached_property
    def patch(self) -> int | None:
        """The smallest with at most 256 tokens an image; None where no patch divides it into so few."""
        return next((p for p in (2, 4, 8) if self.size % p == 0 and (self.size // p) ** 2 <= 256), None)

    @property
    def is_dit(self) -> bool:
        """Class-conditional models that the machine can train as one. Diffusers' own DiT is conditional too, and a
        UNet without classes is what it has a ready pipeline for.
        """
        small_enough = bool(self.machine.gpus) or self.size <= SMALL
        return bool(self.facts.num_classes and self.patch and small_enough)

    @cached_property
    def batch(self) -> int:
        """A power of two, for each of an odd number of GPUs, no larger than the data set."""
        ranks = self.machine.gpus or 1
        limits = {32: 256, 64: 128} if self.machine.gpus else {SMALL: 128, 32: 64}
        wanted = next((batch for side, batch in limits.items() if self.size <= side), 64 if self.machine.gpus else 32)
        while wanted > max(ranks, self.facts.samples):
            wanted //= 2
        return max(1, round(wanted / ranks)) * ranks

    @cached_property
    def steps(self) -> int:
        if not self.machine.gpus:
            return 2000 if self.size <= SMALL else 1000
        return max(LONG, min(MOST_STEPS, round(EPOCHS * self.facts.samples / self.batch, -4)))

    def _data(self) -> list[Line]:
        data, facts = self.data, self.facts
        lines = [Line("shards", data.shards)]
        if data.manifest:
            lines.append(Line("manifest", data.manifest, "the folder of the shards stays as it is"))
        if data.holdout:
            lines.append(Line("holdout", data.holdout, data.remark or "what samples are compared with; not trained on"))
        if data.holdout_shards:
            lines.append(Line("holdout_shards", data.holdout_shards))
        times = self.steps * self.batch / facts.samples
        often = f"{times:,.0f}" if times > 9.5 else f"{times:.2g}"
        lines += [
            Line("image_size", self.size, facts.survey.scaling(self.size) or "as the pictures are"),
            Line("channels", self.channels, "the pictures have no colours" if self.channels == 1 else None),
            Line("batch_size", self.batch, f"over all ranks; each picture comes {often} times in all"),
        ]
        if self.channels == 1:
            lines.append(Line("flip", False, "a mirrored digit or letter is another one; else take true"))
        else:
            lines.append(Line("flip", True, "twice the pictures; false where left and right differ, as in text"))
        return lines + self._workers()

    def _workers(self) -> list[Line]:
        """As many as there are cores for and room in /dev/shm; without GPUs the default, where that fits."""
        gpus, room = self.machine.gpus, self.machine.shared_memory
        most = max(1, min(8, self.machine.cores // gpus - 1)) if gpus else 1
        one = (gpus or 1) * shared_memory.pictures_bytes(self.batch // (gpus or 1), self.channels, self.size)
        fitting = [n for n in range(most + 1) if room is None or n == 0 or shared_memory.batches(n) * one <= room]
        if fitting[-1] < most:
            return [Line("workers", fitting[-1], "loader processes; more have no room in this machine's /dev/shm")]
        return [Line("workers", most, "loader processes a GPU")] if gpus else []

    def _dit(self) -> list[Line]:
        if self.machine.gpus:
            tokens = (self.size // self.patch) ** 2
            size = [Line("size", f"S/{self.patch}", f"33 M parameters; {tokens} tokens an image")]
        else:
            about = "0.7 M parameters: small enough for CPU cores"
            size = [Line("depth", 4, about), Line("width", 96), Line("heads", 4), Line("patch", self.patch)]
        shift = Line("frequency_shift", 1, "as diffusers' own, so that the model can be exported to it")
        return [Line("name", "dit"), *size, shift, self._classes()]

    def _unet(self) -> list[Line]:
        smallest = 4 if self.machine.gpus else min(7, self.size // 2)
        halvings = max(n for n in range(4) if self.size % 2**n == 0 and (n == 0 or self.size >> n >= smallest))
        sides = [self.size >> n for n in range(halvings + 1)]
        levels = Line("multipliers", [1, 2, 2, 2][: halvings + 1], ", ".join(f"{side}×{side}" for side in sides))
        if not self.machine.gpus:
            width, blocks = Line("width", 32, "about 1 M parameters: small enough for CPU cores"), 1
            attention, dropout = [s for s in sides if s <= 8][:1], []
        else:
            few = self.facts.samples < FEW
            width = Line("width", 64, "few pictures: half of DDPM's") if few else Line("width", 128, "as DDPM's")
            blocks, dropout = 2, [Line("dropout", 0.1)]
            attention = [s for s in sides if s <= 16][:1]
        own = [width, levels, Line("res_blocks", blocks), Line("attention", attention), *dropout]
        return [Line("name", "unet"), *own, self._classes()]

    def _classes(self) -> Line:
        facts = self.facts
        if not facts.labelled:
            about = "the pictures have no labels"
        elif not facts.num_classes:
            about = "all labels are one, so there is nothing to tell apart"
        elif facts.classes:
            about = named(facts.classes)
        else:
            seen = "the labels" if facts.all_labels_read else "some of the labels"
            about = f"{seen} go from 0 to {facts.num_classes - 1}; no manifest names them"
        return Line("num_classes", facts.num_classes, about)

    def _diffusion(self) -> list[Line]:
        lines = []
        if self.machine.gpus:
            lines.append(Line("schedule", "cosine", "in small pictures linear spends half its steps on pure noise"))
        lines.append(Line("prediction", "v", "after few steps better than eps, whose error the last step magnifies"))
        if self.facts.num_classes:
            lines.append(Line("label_dropout", 0.1, "now and then without the label, so that guidance works"))
        return lines

    def _optim(self) -> list[Line]:
        if self.machine.gpus:
            lr = 1.0e-4 if self.is_dit else 2.0e-4
            return [Line("lr", lr, "the paper's"), Line("warmup_steps", min(1000, self.steps // 10))]
        lr = 2.0e-3 if self.is_dit else 1.0e-3
        why = "ten times the usual: the model is small and the run short"
        return [Line("lr", lr, why), Line("warmup_steps", self.steps // 20)]

    def _ema(self) -> Line:
        over = min(10_000, self.steps // 10)
        return Line("decay", round(1 - 1 / over, 6), f"averages the last {over:,} of {self.steps:,} steps", item=True)

    def _deepspeed(self) -> list[Line]:
        if not self.machine.gpus:
            return []
        return [
            Line("zero_stage", 1, "only the optimizer is worth sharding"),
            Line("precision", "bf16_autocast", "products in bf16; weights stay fp32"),
        ]

    def _eval(self) -> list[Line]:
        if not self.data.holdout:
            return [Line("every", 0, self.data.remark)]
        name, why = features(self.size)
        short = not self.machine.gpus and self.size > SMALL
        samples = 5000 if self.machine.gpus else 2000 if not short else 1000 if self.size <= 32 else 500
        return [
            Line("every", self.steps // (5 if self.steps < LONG else 10)),
            Line("num_samples", samples, f"against {self.facts.held_out:,} held-out pictures"),
            Line("features", name, why),
            Line("steps", 20 if short else 50, "of the sampler, for one picture"),
            Line("clip", True, "pictures end within their range; without, colours saturate"),
        ]
