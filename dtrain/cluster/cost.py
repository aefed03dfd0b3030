"""What a micro-batch costs in operations and memory, found by running the model on tensors that hold nothing.

Forward and backward run on the meta device, so a model of any size takes seconds and no memory. Two things are put in
by hand there, because the meta device does not do what accelerators do: attention is one fused kernel, which keeps
queries, keys, values, its output and a logarithm a row, and no T × T matrix (what torch takes on GPUs in every
precision, and on CPUs); and autocast casts what its device's rules say.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from dtrain.conditions.build import typical_forward
from dtrain.conditions.requirements import caption_bytes
from dtrain.config import Config
from dtrain.data.shards.manifest import glance
from dtrain.first_stage.build import DECODE_BATCH
from dtrain.models.build import allocate

aten = torch.ops.aten
PRODUCTS = {F.linear, F.conv2d, F.scaled_dot_product_attention}
NORMS = {F.layer_norm, F.group_norm, F.rms_norm}  # autocast computes them in fp32, on GPUs only


@dataclass(frozen=True)
class Activations:
    """Bytes of a micro-batch's forward and backward pass, beside weights and their gradients."""

    saved: int  # what the forward pass keeps for the backward pass
    peak: int  # most at any moment of the two


def activations(config: Config, micro_batch: int, checkpointing: bool, device: str = "cuda") -> Activations:
    """What is kept for backward of `micro_batch` rows in `deepspeed.precision`, with or without checkpointing them.

    device: whose rules of autocast hold, cuda or cpu. A weight's gradient counts only until it is handed on.
    """
    forward = _trained(config, micro_batch, checkpointing)
    with LiveBytes() as live, _accelerator(config.deepspeed.precision, device):
        loss = forward().float().square().mean()
        saved = live.now
        _backward(loss)
    return Activations(saved, live.peak)


def flops_per_image(config: Config, checkpointing: bool) -> int:
    """Floating-point operations (a multiply-add is two) of one image's forward and backward pass, repeated ones too."""
    forward = _trained(config, 1, checkpointing)
    # Apart from `activations`: the counter holds on to what is computed again.
    accelerator = _accelerator(config.deepspeed.precision, "cuda")
    with FlopCounterMode(display=False, custom_mapping=FUSED_ATTENTION) as counter, accelerator:
        _backward(forward().float().square().mean())
    return counter.get_total_flops()


def _backward(loss: torch.Tensor) -> None:
    """As loss.backward(), which modes of functions intercept, and are off while blocks are computed again in it."""
    _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), accumulate_grad=True)


def _trained(config: Config, rows: int, checkpointing: bool) -> Callable[[], torch.Tensor]:
    """A forward pass of the model in the training's own dtype, which lets go of each gradient at once."""
    model, forward = _model(config, rows, torch.bfloat16 if config.deepspeed.precision == "bf16" else torch.float32)
    model.train().activation_checkpointing = checkpointing
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    return forward


def sampling_bytes(config: Config, rows: int) -> int:
    """Most bytes, beside fp32 weights, that a forward pass of the plain model holds while samples are drawn."""
    model, forward = _model(config, rows, torch.float32)
    model.eval()
    with torch.no_grad(), LiveBytes() as live, _Accelerator(False, "cuda"):
        forward()
    return live.peak


@dataclass(frozen=True)
class FirstStageCost:
    """An autoencoder on a device: bytes of its weights, and what comes and goes while it encodes and decodes a block.

    flops_per_image: of encoding a picture in each step; none with a cache. precision: of its convolutions, which nearly
    all of them are: fp32, tf32 or bf16.
    """

    weights: int = 0
    encoding: int = 0
    decoding: int = 0
    flops_per_image: int = 0
    precision: str = "fp32"


@dataclass(frozen=True)
class CachedWords:
    """What a cache of a condition's words takes on disk. each: most bytes of a caption; samples: None: not known."""

    condition: str
    length: int
    width: int
    dtype: str
    each: int
    samples: int | None


@dataclass(frozen=True)
class TextCost:
    """Frozen text encoders on a device: bytes of the weights of those that a training asks in each step, and of all,
    which prompts and held-out captions ask.

    flops_per_image: of encoding a caption in each step, as many as its tokens pass weights; none with a cache.
    """

    in_steps: int = 0
    weights: int = 0
    flops_per_image: int = 0
    cached: tuple[CachedWords, ...] = ()


def text_cost(config: Config) -> TextCost:
    """Raises UserError where an encoder's folder is not there."""
    from dtrain.conditions.encoders import on_meta

    in_steps = weights = flops = 0
    cached = []
    found = glance(config.data.manifest_path)
    for name, section in config.texts.items():
        if section.trained:
            continue
        parameters = list(on_meta(section).parameters())
        size = sum(p.nbytes for p in parameters)
        weights += size
        if section.cached is None:
            in_steps, flops = in_steps + size, flops + 2 * section.length * sum(p.numel() for p in parameters)
        else:
            each = round(caption_bytes(section, section.cached))
            shape = section.length, section.width, section.cached
            cached.append(CachedWords(name, *shape, each, found and found.samples))
    return TextCost(in_steps, weights, flops, tuple(cached))


def first_stage_cost(config: Config) -> FirstStageCost:
    """Nothing of pixels, and of what a plug-in brings. Raises UserError where the autoencoder's folder is not there."""
    section, data = config.first_stage, config.data
    if section.kind != "kl":
        return FirstStageCost()
    from dtrain.first_stage.autoencoder import DTYPES, on_meta

    dtype, module = DTYPES[section.precision], on_meta(section.source, section.precision)

    def cost_of(function: Callable[[torch.Tensor], object], rows: int, *shape: int) -> tuple[int, int]:
        """(bytes, operations)."""
        given = torch.zeros(rows, *shape, dtype=dtype, device="meta")
        counter = FlopCounterMode(display=False, custom_mapping=FUSED_ATTENTION)
        with torch.no_grad(), counter, LiveBytes() as live, _Accelerator(False, "cuda"):
            function(given)
        return live.peak, counter.get_total_flops()

    picture = data.channels, data.image_size, data.image_size
    encoding, flops = cost_of(module.encode, section.block, *picture)
    decoding, _ = cost_of(module.decode, config.eval.decode_batch or DECODE_BATCH, *config.shape)
    each = 0 if section.cached else flops // section.block
    precision = "tf32" if section.precision == "fp32" and config.train.tf32 != "none" else section.precision
    return FirstStageCost(sum(p.nbytes for p in module.parameters()), encoding, decoding, each, precision)


def _model(config: Config, rows: int, dtype: torch.dtype) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    """(the backbone, a forward pass of so many rows of zeros)."""
    with torch.device("meta"):
        model = allocate(config).to(dtype)
        forward = typical_forward(model, config, rows)
    return model, forward


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that were made since it was entered and still live."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, object] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for t in tree_iter((args, kwargs)):
            if isinstance(t, torch.Tensor):  # what was there before, such as a weight, is not counted
                self._known.setdefault(id(t.untyped_storage()), t.untyped_storage())
        out = function(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, torch.Tensor):
                self._count(t.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return

        def gone(_):
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _accelerator(precision: str, device: str) -> "_Accelerator":
    """precision: deepspeed.precision. device: cuda or cpu."""
    return _Accelerator(precision == "bf16_autocast", device)


class _Accelerator(TorchFunctionMode):
    """Fused attention and, where asked for, autocast to bf16, as the device does them."""

    def __init__(self, autocast: bool, device: str):
        super().__init__()
        self.autocast, self.fp32 = autocast, NORMS if device == "cuda" else set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.autocast and (function in PRODUCTS or function in self.fp32):
            dtype = torch.bfloat16 if function in PRODUCTS else torch.float32
            args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to(dtype), (args, kwargs))
        if function is F.scaled_dot_product_attention:
            return _fused_attention(*args, **kwargs)
        return function(*args, **kwargs)


def _fused_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None) -> torch.Tensor:
    """Called as `F.scaled_dot_product_attention` is; the kernel has its arguments in another order."""
    mask = None if attn_mask is None else attn_mask.to(q.dtype)
    kernel = aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(q, k, v, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]


def _attention_flops(q, k, v, *_, out_shape=None, **__) -> int:
    """Two products of T × T × D for each row and head."""
    return 4 * q[0] * q[1] * q[2] * k[2] * q[3]


def _attention_backward_flops(grad, q, k, *_, out_shape=None, **__) -> int:
    """Twice the forward's, as of any product: that kernels compute the scores again is not the model's own work."""
    return 2 * _attention_flops(q, k, None)


FUSED_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
