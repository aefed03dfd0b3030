"""What one rank holds at each ZeRO stage, in bytes; imports no torch.

P trainable parameters, F frozen ones, R ranks, E averages, w bytes a weight (4, or 2 with precision bf16), b the
bucket in which gradients are reduced.
"""

from dataclasses import asdict, dataclass
from itertools import accumulate

from dtrain.config import DeepSpeed

PERSISTENT = 100_000  # elements; stage 3 leaves smaller parameters whole on every rank
MOST_GATHERED = 1_000_000_000  # elements that stage 3 gathers before it lets go of some


@dataclass(frozen=True)
class Sizes:
    """Elements of a model's parameters."""

    each: tuple[int, ...]  # of the trainable ones, in the model's order
    frozen: int

    @classmethod
    def of(cls, model) -> "Sizes":
        trainable = tuple(p.numel() for p in model.parameters() if p.requires_grad)
        return cls(trainable, sum(p.numel() for p in model.parameters() if not p.requires_grad))

    @property
    def trainable(self) -> int:
        return sum(self.each)

    @property
    def persistent(self) -> int:
        """How many of the trainable ones stage 3 never partitions."""
        return sum(n for n in self.each if n < PERSISTENT)

    def share(self, ranks: int, stage: int) -> int:
        """Trainable elements of a rank's own, padding too: stage 3 cuts each parameter, 1 and 2 all of them as one."""
        if stage == 0:
            return self.trainable
        if stage == 3:
            return sum(-(-n // ranks) for n in self.each)
        return 2 * -(-self.trainable // (2 * ranks))

    def touched(self, ranks: int) -> int:
        """Elements of all parameters with a part in a rank's share at stages 1 and 2, of the rank that has most."""
        share, ends = self.share(ranks, 1), accumulate(self.each)
        spans = [(end - n, end) for n, end in zip(self.each, ends, strict=True)]
        shares = [(rank * share, (rank + 1) * share) for rank in range(ranks)]
        return max(sum(e - b for b, e in spans if b < last and e > first) for first, last in shares)


@dataclass(frozen=True)
class State:
    """Bytes of a rank between backward pass and step, on the device and, where it is offloaded, on the host."""

    weights: int
    masters: int
    gradients: int
    moments: int
    averages: int
    buckets: int  # DeepSpeed's flat buffers that live that long
    host: int  # of these, in the host's memory

    @property
    def device(self) -> int:
        held = asdict(self)
        return sum(held.values()) - 2 * held["host"]


def state(deepspeed: DeepSpeed, averages: int, sizes: Sizes, ranks: int, stage: int) -> State:
    """What the rank that holds most has at `stage`, by the section's precision and offload; averages: how many.

    Stages 1 and 2 keep the gradients of a parameter that a share's end cuts through whole, on both sides.
    """
    w, share = weight_bytes(deepspeed), sizes.share(ranks, stage)
    weights = w * (sizes.trainable + sizes.frozen)
    if stage == 0:
        return State(weights, 0, w * share, 8 * share, 4 * averages * share, 0, 0)
    gradients, buckets = w * sizes.touched(ranks), 0
    if stage == 3:
        weights = w * (share + -(-sizes.frozen // ranks) + (sizes.persistent if ranks > 1 else 0))
        gradients, buckets = w * share, bucket_bytes(deepspeed, sizes, stage)
    held = [weights, 4 * share, gradients, 8 * share, 4 * averages * share, buckets]
    return State(*held, host={"none": 0, "optimizer": sum(held[1:5]), "all": sum(held[:5])}[deepspeed.offload])


def in_backward(deepspeed: DeepSpeed, sizes: Sizes, ranks: int, stage: int) -> int:
    """Bytes that come and go during the backward pass at most, beside activations and `state`.

    Stage 1 holds every gradient whole until the last is there, stage 3 nearly so; stages 0 to 2 flatten gradients into
    a bucket, stage 2 once more to reduce them; stage 3 gathers weights and keeps them until the pass has gone by. An
    upper bound, from traces of DeepSpeed 0.19.8 with one bucket and with several.
    """
    whole, bucket = weight_bytes(deepspeed) * sizes.trainable, bucket_bytes(deepspeed, sizes, stage)
    filled = 2 if ranks > 1 else 1  # of several ranks one bucket is filled while the other is reduced
    gathered = weight_bytes(deepspeed) * min(sizes.trainable, MOST_GATHERED) if ranks > 1 else 0
    return {
        0: bucket,
        1: whole + filled * bucket,
        2: (filled + 1) * bucket,
        3: whole + gathered,
    }[stage]


def in_step(deepspeed: DeepSpeed, sizes: Sizes, ranks: int, stage: int) -> int:
    """Bytes that come and go while the optimizer steps: fp32 gradients of the masters, and what AdamW computes."""
    if deepspeed.offload != "none":
        return 0
    return round(4 * sizes.trainable * (1 if stage == 0 else 3 / ranks))


def weight_bytes(deepspeed: DeepSpeed) -> int:
    return 2 if deepspeed.precision == "bf16" else 4


def bucket_bytes(deepspeed: DeepSpeed, sizes: Sizes, stage: int) -> int:
    return weight_bytes(deepspeed) * deepspeed.bucket(sizes.trainable, stage)


def checkpoint_bytes(sizes: Sizes, averages: int) -> int:
    """Bytes of one checkpoint: fp32 weights, two moments, so many averages; frozen weights once."""
    return 4 * (sizes.trainable * (3 + averages) + sizes.frozen)
