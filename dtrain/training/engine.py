"""The only door to DeepSpeed: build the engine, take a step, hand out this rank's pieces of the state.

A *piece* is a contiguous run of a flattened global tensor: (tensor's name, start, the local fp32 values). Weights,
Adam's moments and the EMAs all come as pieces, whatever the ZeRO stage, so nothing else needs to know the stage.
"""

from dataclasses import dataclass

import torch

from dtrain import distributed
from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.training import ema
from dtrain.training.deepspeed_import import deepspeed

MOMENTS = ("exp_avg", "exp_avg_sq")
NO_CLIPPING = 1e30  # DeepSpeed measures the gradient norm only where it clips


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + values.numel()) of the flattened global tensor `name`; `values` is live memory."""

    name: str  # "<parameter>:<fp32 | exp_avg | exp_avg_sq | ema_i>"
    start: int
    values: torch.Tensor  # (length,) float32


class Engine:
    """A model under DeepSpeed ZeRO with AdamW and EMAs.

    `forward` runs the wrapped model; `step` takes the micro-batches' losses and makes one optimizer step.
    """

    def __init__(self, model: torch.nn.Module, config: Config, micro_batch: int):
        self.stage = config.deepspeed.zero_stage
        self.profiles = config.ema
        self.world_size = distributed.world_size()
        self.micro_batch = micro_batch
        self.clip = config.optim.gradient_clip or NO_CLIPPING
        self.optimizer_steps = 0
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [p for _, p in self.trainable],
            lr=config.optim.lr,
            betas=config.optim.betas,
            weight_decay=config.optim.weight_decay,
        )
        options = deepspeed_options(config, self.world_size, micro_batch, sum(p.numel() for _, p in self.trainable))
        self.module, self.zero, _, _ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=options)
        self._allocate_state()
        ema.attach(self.optimizer, self.profiles)

    # -- stepping ----------------------------------------------------------------------------------------------------

    def __call__(self, *args) -> torch.Tensor:
        return self.module(*args)

    def backward(self, loss: torch.Tensor) -> None:
        """Add one micro-batch's gradient. DeepSpeed divides by the number of micro-batches itself."""
        self.module.backward(loss)
        if not self.module.is_gradient_accumulation_boundary():
            self.module.step()  # counts the micro-batch; moves nothing

    def step(self, lr: float) -> torch.Tensor | float:
        """Clip, step, move the EMAs, after the last micro-batch's `backward`; the gradient norm before clipping."""
        assert self.module.is_gradient_accumulation_boundary(), "step() belongs after the last micro-batch"
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.stage == 0:
            norm = torch.nn.utils.clip_grad_norm_([p for _, p in self.trainable], self.clip)
            self.module.step()
        else:
            self.module.step()
            norm = self.module.get_global_grad_norm()
        self.optimizer_steps += 1
        return norm

    # -- state -------------------------------------------------------------------------------------------------------

    def _masters(self) -> list[torch.Tensor]:
        """The fp32 tensors the optimizer steps on this rank."""
        if self.stage == 0:
            return [p for _, p in self.trainable]
        return list(self.zero.single_partition_of_fp32_groups)

    @torch.no_grad()
    def _allocate_state(self) -> None:
        """Make Adam's moments and the EMAs now.

        DeepSpeed lets them appear at the first real step and links them late, which breaks loading and gathering before
        it. The EMAs start as the initial weights.
        """
        for master in self._masters():
            state = self.optimizer.state[master]
            state["step"] = torch.tensor(0.0)
            for key in MOMENTS:
                state[key] = torch.zeros_like(master, memory_format=torch.preserve_format)
            for key in ema.ema_keys(self.profiles):
                state[key] = master.detach().clone()
        if self.stage in (1, 2):
            self.zero._lazy_init_hp_params_optimizer_state()

    def state_keys(self) -> list[str]:
        return ["fp32", *MOMENTS, *ema.ema_keys(self.profiles)]

    def pieces(self, whole: bool = False) -> list[Piece]:
        """Every piece this rank holds, live.

        Where ranks hold copies (stage 0, frozen parameters) each gives only its share, so that the ranks together give
        each element exactly once; with `whole` each gives all it holds, which is what loading must fill.
        """
        pieces = []
        for name, p in self.trainable:
            if self.stage == 0:
                for key in self.state_keys():
                    values = p.data if key == "fp32" else self.optimizer.state[p][key]
                    pieces.append(self._copy(f"{name}:{key}", values, whole))
            elif (mapping := p._hp_mapping) is not None:
                start = mapping.lp_fragment_address.start
                for key in self.state_keys():
                    values = mapping.get_hp_fragment(None if key == "fp32" else key)
                    pieces.append(Piece(f"{name}:{key}", start, values.detach().view(-1)))
        pieces += [self._copy(f"{name}:fp32", p.data, whole) for name, p in self.frozen]
        return [piece for piece in pieces if piece.values.numel()]

    def _copy(self, name: str, values: torch.Tensor, whole: bool) -> Piece:
        """All of a tensor that every rank holds, or this rank's share of it."""
        rank, ranks = (0, 1) if whole else (distributed.rank(), self.world_size)
        start, stop = values.numel() * rank // ranks, values.numel() * (rank + 1) // ranks
        return Piece(name, start, values.detach().view(-1)[start:stop])

    def tensor_sizes(self) -> dict[str, int]:
        """Name → number of elements of every global tensor a checkpoint of this engine holds."""
        sizes = {f"{n}:{k}": p.numel() for n, p in self.trainable for k in self.state_keys()}
        return sizes | {f"{n}:fp32": p.numel() for n, p in self.frozen}

    @torch.no_grad()
    def refresh(self, optimizer_steps: int) -> None:
        """After the pieces were overwritten: make the model's own weights equal them and set Adam's step count."""
        self.optimizer_steps = optimizer_steps
        for master in self._masters():
            self.optimizer.state[master]["step"].fill_(float(optimizer_steps))
        if self.stage in (1, 2):
            self.zero.update_lp_params()

    @torch.no_grad()
    def gather(self, key: str, into: torch.nn.Module) -> torch.nn.Module:
        """Copy the full weights (key "fp32") or an EMA ("ema_0") into a plain module on every rank, tensor by tensor.

        A collective: every rank calls it. Frozen parameters and buffers are copied as they are.
        """
        target = dict(into.named_parameters())
        for name, p in self.trainable:
            if self.stage == 0:
                value = p.data if key == "fp32" else self.optimizer.state[p][key]
            else:
                value = p.get_full_hp_param(None if key == "fp32" else key)
            target[name].copy_(value.view(target[name].shape))
        for name, p in self.frozen:
            target[name].copy_(p)
        buffers = dict(into.named_buffers())
        for name, b in self.module.module.named_buffers():
            buffers[name].copy_(b)
        return into


def deepspeed_options(config: Config, world_size: int, micro_batch: int, parameters: int) -> dict:
    """DeepSpeed's configuration from ours, every default it could change under us written out; `extra` merged last."""
    bucket = max(1, min(parameters, 500_000_000))  # elements; DeepSpeed allocates it whole
    options = {
        "train_batch_size": config.data.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": config.data.batch_size // world_size // micro_batch,
        "gradient_clipping": 0.0 if config.deepspeed.zero_stage == 0 else config.optim.gradient_clip or NO_CLIPPING,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "dump_state": False,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": config.deepspeed.zero_stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": bucket,
            "allgather_partitions": True,
            "allgather_bucket_size": 500_000_000,
            "overlap_comm": False,
            "round_robin_gradients": False,
            "ignore_unused_parameters": True,
        },
    }
    return _merged(options, config.deepspeed.extra)


def _merged(base: dict, extra: dict) -> dict:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def rows_per_rank(config: Config, world_size: int) -> tuple[int, int]:
    """(rows of one rank per step, rows per micro-batch), or a UserError that names the nearest that divides."""
    batch = config.data.batch_size
    if batch % world_size:
        below, above = batch - batch % world_size, batch + world_size - batch % world_size
        nearest = above if not below or above - batch < batch - below else below
        raise UserError(
            f"data.batch_size {batch} does not divide by {world_size} ranks; the nearest that does is {nearest}"
        )
    rows = batch // world_size
    micro = config.train.micro_batch or rows
    if rows % micro:
        fitting = [m for m in range(1, rows + 1) if rows % m == 0]
        nearest = min(fitting, key=lambda m: abs(m - micro))
        raise UserError(
            f"train.micro_batch {micro} does not divide the {rows} rows of a rank "
            f"(data.batch_size {batch} on {world_size} ranks); the nearest that does is {nearest}"
        )
    return rows, micro
