"""Small trainings of JiT's parts: x_0 predicted in pixels by a flow, and the options of its DiT."""

from tests.digits import tiny

X0 = (
    *("diffusion={process: flow, prediction: x0, times: logit_normal, logit_normal_mean: 0.8, logit_normal_std: 0.8}",),
    *("eval.sampler=euler",),
)
OPTIONS = {
    "norm": ("model.norm=rms",),
    "mlp": ("model.mlp=swiglu",),
    "positions": ("model.positions=rotary",),
    "bottleneck": ("model.patch_bottleneck=6",),
    "context": ("model.context_tokens=4", "model.context_from=1"),
}
ALL = ("model.qk_norm=true", *(key for keys in OPTIONS.values() for key in keys))


def of_jit(digits, folder, *overrides):
    """A run of 16 steps of a DiT of two blocks, saved after each 4 and evaluated at its end."""
    own = ("model.depth=2", "train.steps=16", "train.checkpoint_every=4", "train.keep_last=9", "eval.every=16")
    own += ("optim.warmup_steps=0",)  # whatever moves the blocks is to be seen in the losses
    own += ("ema.0.decay=0.5", "eval.num_samples=24", "eval.steps=3", "eval.guidance=2", "eval.validation_images=24")
    return tiny(digits, folder, *own, *X0, *overrides)
