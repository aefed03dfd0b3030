"""The only door to DeepSpeed: build the engine, take a step, hand out this rank's pieces of the state.

A *piece* is a contiguous run of a flattened global tensor: (tensor's name, start, the local values). Weights, Adam's
moments and the EMAs all come as pieces, whatever the ZeRO stage, so nothing else needs to know the stage.
"""

import sys
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from dtrain import distributed
from dtrain.checkpoint.format import Checkpoint
from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.models.build import allocate
from dtrain.models.layers import initialize
from dtrain.training import ema
from dtrain.training.deepspeed_import import deepspeed
from dtrain.training.options import NO_CLIPPING, deepspeed_options
from dtrain.training.safety.refusal import Refusal

LARGEST = sys.float_info.max
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + values.numel()) of the flattened global tensor `name`; `values` is live memory."""

    name: str  # "<parameter>:<fp32 | exp_avg | exp_avg_sq | ema_i>"
    start: int
    values: torch.Tensor  # (length,), float32 but for frozen parameters of a bf16 model


class Engine:
    """The config's model under DeepSpeed ZeRO with AdamW and EMAs, its initial weights those of `run.seed`.

    Call it for a forward, `backward` each micro-batch's loss, then `step`.
    """

    def __init__(self, config: Config, micro_batch: int):
        self.stage = config.deepspeed.zero_stage
        self.profiles = config.ema
        self.micro_batch = micro_batch
        self.clip = config.optim.gradient_clip or NO_CLIPPING
        self.optimizer_steps = 0
        self._config = config
        with torch.device("meta"):
            plan = allocate(config)
        self.shapes = {name: tuple(p.shape) for name, p in plan.named_parameters()}
        trainable = sum(p.numel() for p in plan.parameters() if p.requires_grad)
        self.options = options = deepspeed_options(config, distributed.world_size(), micro_batch, trainable)

        # At stage 3 every layer is partitioned as soon as it is allocated, so no rank ever holds the whole model.
        deepspeed.init_distributed(verbose=False)  # takes the process group that is there
        with deepspeed.zero.Init(config_dict_or_path=options) if self.stage == 3 else nullcontext():
            model = allocate(config)
        if self.stage != 3:
            initialize(model, config.run.seed)
        model.activation_checkpointing = config.train.activation_checkpointing
        self.trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
        self._initial_value = model.initial_value
        self.optimizer = torch.optim.AdamW(
            [p for _, p in self.trainable],
            lr=config.optim.lr,
            betas=config.optim.betas,
            weight_decay=config.optim.weight_decay,
        )
        self.module, self.zero, _, _ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=options)
        self._allocate_state()
        if self.stage == 3 or config.deepspeed.precision == "bf16":
            self._write_initial_weights()
        self._refusal = Refusal(self.optimizer, self._norm)
        ema.attach(self.optimizer, self.profiles, unless=self._refusal.refuses)
        if config.train.compile:
            self.module.compile()

    # -- stepping ----------------------------------------------------------------------------------------------------

    def __call__(self, *args, **kwargs) -> torch.Tensor:
        return self.module(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Add one micro-batch's gradient. DeepSpeed divides by the number of micro-batches itself.

        A loss that is not finite makes the whole gradient so, and with it the norm that every rank gets: the factor is
        exactly 1 otherwise, and nobody waits for its value.
        """
        self.module.backward(loss * (1 + 0 * loss.detach()))
        if not self.module.is_gradient_accumulation_boundary():
            self.module.step()  # counts the micro-batch; moves nothing

    def step(self, lr: float, limit: float = LARGEST) -> float:
        """Clip, step, move the EMAs, after the last micro-batch's `backward`; the norm of the mean gradient, unclipped.

        A step whose norm is over `limit`, infinite or not a number moves nothing, bit for bit, on any rank: no weight,
        moment, average or step count. The norm is the same on all ranks, so they need not ask each other.
        """
        assert self.module.is_gradient_accumulation_boundary(), "step() belongs after the last micro-batch"
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.stage == 0:
            self._norm_at_0 = self._clip_at_0()
        self._refusal.begin(limit)
        self.module.step()
        norm = self._norm()
        self.optimizer_steps += norm <= limit
        return norm

    def _norm(self) -> float:
        """The gradient norm of this step. DeepSpeed's own has been reduced by the time the optimizer is called."""
        return self._norm_at_0 if self.stage == 0 else float(self.zero._global_grad_norm)

    def _clip_at_0(self) -> float:
        """Ranks hold the same gradients but may round differently where their devices differ: they take the largest."""
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in self.trainable], self.clip)
        norm = torch.where(norm.isfinite(), norm, torch.inf)
        if distributed.world_size() > 1:
            dist.all_reduce(norm, op=dist.ReduceOp.MAX)
        return norm.item()

    # -- state -------------------------------------------------------------------------------------------------------

    def _masters(self) -> list[torch.Tensor]:
        """The fp32 tensors the optimizer steps on this rank."""
        if self.stage == 0:
            return [p for _, p in self.trainable]
        if self.stage == 3:
            return list(self.zero.fp32_partitioned_groups_flat)
        return list(self.zero.single_partition_of_fp32_groups)

    @torch.no_grad()
    def _allocate_state(self) -> None:
        """Make Adam's moments and the EMAs now; the EMAs begin as the initial weights.

        DeepSpeed lets state appear at the first real step and links it late, which breaks loading and gathering before.
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

    def _write_initial_weights(self) -> None:
        """The exact initial weights into the fp32 masters and EMAs, where building the model could not put them."""
        with torch.no_grad():
            for master in self._masters():
                master.zero_()  # the padding between partitions, allocated and never written
        self._write(lambda name: self._initial_value(name, self.shapes[name], self._config.run.seed))
        self.refresh(optimizer_steps=0)

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the initial weights, EMAs as these, moments zero, no step taken. On all ranks."""
        for piece in self.pieces(whole=True):
            if piece.name.split(":")[1] in MOMENTS:
                piece.values.zero_()
        self._write_initial_weights()

    def set_weights(self, model: torch.nn.Module) -> None:
        """Begin with a whole model's weights, EMAs as these and moments zero; `refresh` must follow on all ranks."""
        weights = dict(model.named_parameters())
        self._write(lambda name: weights[name].detach())

    @torch.no_grad()
    def _write(self, value_of) -> None:
        """value_of(name), a whole tensor, into every piece of that parameter's weights and EMAs."""
        values, of = None, None
        for piece in sorted(self.pieces(whole=True), key=lambda p: p.name.split(":")[0]):
            name, key = piece.name.split(":")
            if key in MOMENTS:
                continue
            if name != of:
                values, of = value_of(name).flatten(), name
            piece.values.copy_(values[piece.start : piece.start + piece.values.numel()])

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
            elif self.stage == 3:
                for key in self.state_keys():
                    values, _ = self.zero._get_fp32_opt_state_partition(p, False, None if key == "fp32" else key)
                    pieces.append(self._partition(f"{name}:{key}", p, values))
            elif (mapping := p._hp_mapping) is not None:
                for key in self.state_keys():
                    values = mapping.get_hp_fragment(None if key == "fp32" else key)
                    pieces.append(Piece(f"{name}:{key}", mapping.lp_fragment_address.start, values.detach().view(-1)))
        for name, p in self.frozen:
            if self.stage == 3:
                pieces.append(self._partition(f"{name}:fp32", p, p.ds_tensor.data))
            else:
                pieces.append(self._copy(f"{name}:fp32", p.data, whole))
        return [piece for piece in pieces if piece.values.numel()]

    def _copy(self, name: str, values: torch.Tensor, whole: bool) -> Piece:
        """All of a tensor that every rank holds, or this rank's share of it."""
        rank, ranks = (0, 1) if whole else (distributed.rank(), distributed.world_size())
        start, stop = values.numel() * rank // ranks, values.numel() * (rank + 1) // ranks
        return Piece(name, start, values.detach().view(-1)[start:stop])

    def _partition(self, name: str, p: torch.nn.Parameter, values: torch.Tensor) -> Piece:
        """This rank's part of a stage-3 parameter, without the padding behind the last one."""
        start = distributed.rank() * p.ds_tensor.ds_numel
        length = max(0, min(p.ds_tensor.ds_numel, p.ds_numel - start))
        return Piece(name, start, values.detach().view(-1)[:length])

    def tensor_sizes(self) -> dict[str, int]:
        """Name → number of elements of every global tensor a checkpoint of this engine holds."""
        numel = {name: int(np.prod(shape)) for name, shape in self.shapes.items()}
        sizes = {f"{name}:{key}": numel[name] for name, _ in self.trainable for key in self.state_keys()}
        return sizes | {f"{name}:fp32": numel[name] for name, _ in self.frozen}

    def load(self, checkpoint: Checkpoint) -> None:
        """Fill this rank's pieces from a checkpoint of any shape; `refresh` must follow on all ranks.

        An EMA profile that the checkpoint lacks begins as its weights. Raises Damaged, or UserError for another model.
        """
        self._fill(
            checkpoint, lambda name, key: (name, key) if f"{name}:{key}" in checkpoint.tensors else (name, "fp32")
        )

    def load_weights(self, checkpoint: Checkpoint, key: str = "fp32") -> None:
        """Begin with a checkpoint's weights, EMAs as these and moments zero; `refresh` must follow on all ranks.

        key: "fp32", the raw ones, or of one of its averages "ema_0". Raises Damaged, or UserError for another model.
        """
        if key != "fp32" and not any(name.endswith(f":{key}") for name in checkpoint.tensors):
            raise UserError(f"{checkpoint.path} holds no weights {key}")
        averaged = {name for name, _ in self.trainable}  # frozen parameters have only "fp32"
        self._fill(
            checkpoint, lambda name, own: None if own in MOMENTS else (name, key if name in averaged else "fp32")
        )

    @torch.no_grad()
    def _fill(self, checkpoint: Checkpoint, source) -> None:
        """Every piece (name, key) from the checkpoint's tensor that `source(name, key)` names; None leaves it."""
        theirs = {n.removesuffix(":fp32"): size for n, size in checkpoint.tensors.items() if n.endswith(":fp32")}
        ours = {name: int(np.prod(shape)) for name, shape in self.shapes.items()}
        for name in sorted(theirs.keys() | ours.keys()):
            if theirs.get(name) != ours.get(name):
                raise UserError(
                    f"{checkpoint.path} is of another model: {name} has {theirs.get(name, 'no')} elements there, "
                    f"{ours.get(name, 'none')} here"
                )
        wanted, later = [], []
        for piece in self.pieces(whole=True):
            if (found := source(*piece.name.split(":"))) is None:
                continue
            values = piece.values
            if values.dtype != torch.float32 or values.device.type != "cpu":
                values = torch.empty(values.numel())
                later.append((piece, values))
            wanted.append((":".join(found), piece.start, values.numpy()))
        checkpoint.read_into(wanted)
        for piece, values in later:
            piece.values.copy_(values)

    @torch.no_grad()
    def refresh(self, optimizer_steps: int) -> None:
        """After the pieces were overwritten: make the model's own weights equal them and set Adam's step count."""
        self.optimizer_steps = optimizer_steps
        for master in self._masters():
            self.optimizer.state[master]["step"].fill_(float(optimizer_steps))
        if self.stage in (1, 2):
            self.zero.update_lp_params()
        elif self.stage == 3:
            self.zero._partition_all_parameters()  # small parameters stay gathered between steps, and stale
            for group in range(len(self.zero.fp16_groups)):
                self.zero._reassign_or_swap_out_partitioned_parameters(group)

    @torch.no_grad()
    def gather(self, key: str, into: torch.nn.Module) -> torch.nn.Module:
        """Copy the full weights (key "fp32") or an EMA ("ema_0") into a plain module on every rank, tensor by tensor.

        A collective: every rank calls it. Frozen parameters and buffers are copied as they are.
        """
        target, key = dict(into.named_parameters()), None if key == "fp32" else key
        for name, p in self.trainable:
            if self.stage == 0:
                value = p.data if key is None else self.optimizer.state[p][key]
            elif self.stage == 3:
                value = self.zero.get_full_hp_param(p, key)
            else:
                value = p.get_full_hp_param(key)
            target[name].copy_(value.view(target[name].shape))
        for name, p in self.frozen:
            with deepspeed.zero.GatheredParameters([p], enabled=self.stage == 3):
                target[name].copy_(p)
        buffers = dict(into.named_buffers())
        for name, b in self.module.module.named_buffers():
            buffers[name].copy_(b)
        return into
