"""What one rank holds at each ZeRO stage, in bytes; imports no torch.

P trainable parameters, F frozen ones, R ranks, E averages, w bytes a weight (4, or 2 with precision bf16), b the
bucket in which gradients are reduced.
"""

from dataclasses import asdict, dataclass

from dtrain.config import Config

BUCKET = 500_000_000  # elements, DeepSpeed's largest bucket; a smaller model has a smaller one
PERSISTENT = 100_000  # elements; stage 3 leaves smaller parameters whole on every rank
MOST_GATHERED = 1_000_000_000  # elements that stage 3 gathers before it lets go of some


@dataclass(frozen=True)
class Sizes:
    """Elements of a model's parameters."""

    trainable: int
    frozen: int
    persistent: int  # of the trainable ones, those that stage 3 never partitions

    @classmethod
    def of(cls, model) -> "Sizes":
        trainable = [p.numel() for p in model.parameters() if p.requires_grad]
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        return cls(sum(trainable), frozen, sum(n for n in trainable if n < PERSISTENT))


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


def state(config: Config, sizes: Sizes, ranks: int, stage: int) -> State:
    """Of the config's precision, offload and averages at another `stage`; every rank holds the same but for padding."""
    w, share = weight_bytes(config), sizes.trainable / ranks
    offload = config.deepspeed.offload
    averages = 4 * len(config.ema)
    whole = w * sizes.trainable
    if stage == 0:
        p = sizes.trainable
        return State(whole + w * sizes.frozen, 0, whole, 8 * p, averages * p, 0, 0)
    partitioned = stage == 3
    weights = w * ((sizes.trainable + sizes.frozen) / ranks if partitioned else sizes.trainable + sizes.frozen)
    if partitioned and ranks > 1:
        weights += w * sizes.persistent
    held = [weights, 4 * share, w * share, 8 * share, averages * share, bucket_bytes(config, sizes) * partitioned]
    offloaded = {"none": 0, "optimizer": sum(held[1:5]), "all": sum(held[1:5]) + held[0]}[offload]
    return State(*map(round, held), host=round(offloaded))


def in_backward(config: Config, sizes: Sizes, ranks: int, stage: int) -> int:
    """Bytes that come and go during the backward pass at most, beside activations and `state`.

    Stage 1 holds every gradient whole until the last is there, stage 3 nearly so; stages 0 to 2 flatten gradients into
    a bucket, stage 2 once more to reduce them; stage 3 gathers weights and keeps them until the pass has gone by. An
    upper bound, from traces of DeepSpeed 0.19.8 with one bucket and with several.
    """
    whole, bucket = weight_bytes(config) * sizes.trainable, bucket_bytes(config, sizes)
    gathered = weight_bytes(config) * min(sizes.trainable, MOST_GATHERED) if ranks > 1 else 0
    return {
        0: bucket,
        1: whole + bucket,
        2: 2 * bucket,
        3: whole + gathered,
    }[stage]


def in_step(config: Config, sizes: Sizes, ranks: int, stage: int) -> int:
    """Bytes that come and go while the optimizer steps: fp32 gradients of the masters, and what AdamW computes."""
    if config.deepspeed.offload != "none":
        return 0
    return round(4 * sizes.trainable * (1 if stage == 0 else 3 / ranks))


def weight_bytes(config: Config) -> int:
    return 2 if config.deepspeed.precision == "bf16" else 4


def bucket_bytes(config: Config, sizes: Sizes) -> int:
    bucket = config.deepspeed.extra.get("zero_optimization", {}).get("reduce_bucket_size")
    return weight_bytes(config) * (bucket or min(sizes.trainable, BUCKET))


def checkpoint_bytes(config: Config, sizes: Sizes) -> int:
    """Of one checkpoint: fp32 weights, two moments, the averages; frozen weights once."""
    return 4 * (sizes.trainable * (3 + len(config.ema)) + sizes.frozen)
