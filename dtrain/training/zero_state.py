"""Where DeepSpeed keeps weights, Adam's moments and averages at each ZeRO stage, as pieces of flat global tensors.

A *piece* is a contiguous run of a flattened global tensor: (tensor's name, start, the local values). All state comes as
pieces, whatever the stage, so nothing else needs to know the stage.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dtrain import distributed
from dtrain.checkpoint.format import Checkpoint
from dtrain.training.deepspeed_import import deepspeed

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + values.numel()) of the flattened global tensor `name`; `values` is live memory."""

    name: str  # "<parameter>:<fp32 | exp_avg | exp_avg_sq | ema_i>"
    start: int
    values: torch.Tensor  # (length,), float32 but for frozen parameters of a bf16 model


class ZeroState:
    """This rank's share of the state of one DeepSpeed engine.

    zero: DeepSpeed's ZeRO optimizer, at stage 0 not used; trainable, frozen: (name, parameter) in the order of the
    module; averages: the optimizer-state keys of the averages; held: frozen ones that no checkpoint holds.
    """

    def __init__(
        self, stage: int, zero, optimizer: torch.optim.Optimizer, trainable, frozen, averages: list[str], held=()
    ):
        self.stage, self.zero, self.optimizer, self._held = stage, zero, optimizer, list(held)
        self.trainable, self.frozen, self.averages = trainable, frozen, averages
        self._allocate()

    @property
    def keys(self) -> list[str]:
        return ["fp32", *MOMENTS, *self.averages]

    def masters(self) -> list[torch.Tensor]:
        """The fp32 tensors the optimizer steps on this rank."""
        if self.stage == 0:
            return [p for _, p in self.trainable]
        if self.stage == 3:
            return list(self.zero.fp32_partitioned_groups_flat)
        return list(self.zero.single_partition_of_fp32_groups)

    def parameters_of(self, master: torch.Tensor) -> list[torch.nn.Parameter]:
        """Those whose elements one of the tensors that the optimizer steps has a part of, the same on all ranks."""
        if self.stage == 0:
            return [master]
        (number,) = (i for i, one in enumerate(self.masters()) if one is master)
        return list((self.zero.fp16_groups if self.stage == 3 else self.zero.bit16_groups)[number])

    @torch.no_grad()
    def _allocate(self) -> None:
        """Make Adam's moments and the averages now; the averages begin as the initial weights.

        DeepSpeed lets state appear at the first real step and links it late, which breaks loading and gathering before.
        """
        for master in self.masters():
            state = self.optimizer.state[master]
            # Where AdamW itself would put it.
            fused = self.optimizer.defaults["fused"]
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device if fused else "cpu")
            for key in MOMENTS:
                state[key] = torch.zeros_like(master, memory_format=torch.preserve_format)
            for key in self.averages:
                state[key] = master.detach().clone()
        if self.stage in (1, 2):
            self.zero._lazy_init_hp_params_optimizer_state()

    def pieces(self, whole: bool = False, held: bool = False) -> list[Piece]:
        """Every piece this rank holds, live; those of held parameters only where they are asked for.

        Where ranks hold copies (stage 0, frozen parameters) each gives only its share, so that the ranks together give
        each element exactly once; with `whole` each gives all it holds, which is what loading must fill.
        """
        pieces = []
        for name, p in self.trainable:
            if self.stage == 0:
                for key in self.keys:
                    values = p.data if key == "fp32" else self.optimizer.state[p][key]
                    pieces.append(_copy(f"{name}:{key}", values, whole))
            elif self.stage == 3:
                for key in self.keys:
                    values, _ = self.zero._get_fp32_opt_state_partition(p, False, None if key == "fp32" else key)
                    pieces.append(_partition(f"{name}:{key}", p, values))
            elif (mapping := p._hp_mapping) is not None:
                for key in self.keys:
                    values = mapping.get_hp_fragment(None if key == "fp32" else key)
                    pieces.append(Piece(f"{name}:{key}", mapping.lp_fragment_address.start, values.detach().view(-1)))
        for name, p in self.frozen + (self._held if held else []):
            if self.stage == 3:
                pieces.append(_partition(f"{name}:fp32", p, p.ds_tensor.data))
            else:
                pieces.append(_copy(f"{name}:fp32", p.data, whole))
        return [piece for piece in pieces if piece.values.numel()]

    @torch.no_grad()
    def write(self, value_of: Callable[[str], torch.Tensor | None]) -> None:
        """value_of(name), a whole tensor, into every piece of that parameter's weights and averages; None leaves it."""

        def parameter(piece: Piece) -> str:
            return piece.name.split(":")[0]

        written = [p for p in self.pieces(whole=True, held=True) if p.name.split(":")[1] not in MOMENTS]
        for name, pieces in itertools.groupby(sorted(written, key=parameter), parameter):
            if (value := value_of(name)) is not None:
                values = value.flatten()
                for piece in pieces:
                    piece.values.copy_(values[piece.start : piece.start + piece.values.numel()])

    @torch.no_grad()
    def fill(self, checkpoint: Checkpoint, source) -> None:
        """Every piece (name, key) from the checkpoint's tensor that `source(name, key)` names; None leaves it."""
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
    def zero_padding(self) -> None:
        """The padding between partitions, allocated and never written; before every weight is."""
        for master in self.masters():
            master.zero_()

    @torch.no_grad()
    def zero_moments(self) -> None:
        for piece in self.pieces(whole=True):
            if piece.name.split(":")[1] in MOMENTS:
                piece.values.zero_()

    def count_steps(self, steps: int) -> None:
        """Set Adam's step count."""
        for master in self.masters():
            self.optimizer.state[master]["step"].fill_(float(steps))

    @torch.no_grad()
    def refresh(self) -> None:
        """After the pieces were overwritten: make the module's own weights equal them. A collective."""
        if self.stage in (1, 2):
            self.zero.update_lp_params()
        elif self.stage == 3:
            self.zero._partition_all_parameters()  # small parameters stay gathered between steps, and stale
            for group in range(len(self.zero.fp16_groups)):
                self.zero._reassign_or_swap_out_partitioned_parameters(group)

    @torch.no_grad()
    def gather(self, key: str, targets: dict[str, torch.Tensor]) -> None:
        """Copy the whole weights (key "fp32") or averages ("ema_0") of the parameters that `targets` names into it.

        A collective, tensor by tensor. Frozen parameters are copied as they are.
        """
        for name, p in self.trainable:
            if name in targets:
                targets[name].copy_(self.whole(p, key).view(targets[name].shape))
        for name, p in self.frozen + self._held:
            if name in targets:
                with deepspeed.zero.GatheredParameters([p], enabled=self.stage == 3):
                    targets[name].copy_(p)

    def whole(self, p: torch.nn.Parameter, key: str) -> torch.Tensor:
        """All elements of a trainable parameter's weights (key "fp32"), moment or average. A collective."""
        key = None if key == "fp32" else key
        if self.stage == 0:
            return p.data if key is None else self.optimizer.state[p][key]
        return self.zero.get_full_hp_param(p, key) if self.stage == 3 else p.get_full_hp_param(key)


def _copy(name: str, values: torch.Tensor, whole: bool) -> Piece:
    """All of a tensor that every rank holds, or this rank's share of it."""
    rank, ranks = (0, 1) if whole else (distributed.rank(), distributed.world_size())
    start, stop = values.numel() * rank // ranks, values.numel() * (rank + 1) // ranks
    return Piece(name, start, values.detach().view(-1)[start:stop])


def _partition(name: str, p: torch.nn.Parameter, values: torch.Tensor) -> Piece:
    """This rank's part of a stage-3 parameter, without the padding behind the last one."""
    start = distributed.rank() * p.ds_tensor.ds_numel
    length = max(0, min(p.ds_tensor.ds_numel, p.ds_numel - start))
    return Piece(name, start, values.detach().view(-1)[:length])
