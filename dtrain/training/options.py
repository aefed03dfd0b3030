"""DeepSpeed's configuration from ours."""

import torch

from dtrain.config import Config

NO_CLIPPING = 1e30  # DeepSpeed measures the gradient norm only where it clips


def deepspeed_options(config: Config, world_size: int, micro_batch: int, parameters: int) -> dict:
    """The dictionary for `deepspeed.initialize`, with `deepspeed.extra` merged last.

    Every default that DeepSpeed has changed, or could change, under its users is written out.
    """
    ours = config.deepspeed
    bucket = ours.bucket(parameters, ours.zero_stage)
    options = {
        "train_batch_size": config.data.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": config.data.batch_size // world_size // micro_batch,
        "gradient_clipping": 0.0 if ours.zero_stage == 0 else config.optim.gradient_clip or NO_CLIPPING,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "dump_state": False,
        # A gradient that is not finite has no finite norm, which refuses the step: no look at every gradient for it.
        "bf16": {"enabled": ours.precision == "bf16", "check_grad_overflow": False, "immediate_grad_update": True},
        "fp16": {"enabled": False},
        "torch_autocast": {"enabled": ours.precision == "bf16_autocast", "dtype": "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": ours.zero_stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": bucket,
            "allgather_partitions": True,
            "allgather_bucket_size": 500_000_000,
            # Of one rank there is nothing to overlap, and DeepSpeed would wait for the device once a micro-batch more.
            "overlap_comm": torch.cuda.is_available() and (ours.zero_stage == 3 or world_size > 1),
            "round_robin_gradients": False,
            "ignore_unused_parameters": True,
            "sub_group_size": 1_000_000_000,
            "stage3_prefetch_bucket_size": min(bucket, 50_000_000),
            "stage3_param_persistence_threshold": 100_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": False,
        },
    }
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if ours.offload != "none":
        options["zero_optimization"]["offload_optimizer"] = host
    if ours.offload == "all" and ours.zero_stage == 3:  # which a single player may leave
        options["zero_optimization"]["offload_param"] = host
    return _merged(options, ours.extra)


def _merged(base: dict, extra: dict) -> dict:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def deepspeed_defaults() -> dict[str, int | float | str | bool | None]:
    """Option → what the installed DeepSpeed does by itself, of the options that `deepspeed_options` leaves to it.

    ZeRO's begin with `zero.`; sections other than ZeRO's, which are off, are left out.
    """
    from dtrain.training.deepspeed_import import deepspeed

    found = deepspeed.DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1})
    config = Config.model_validate(
        {
            "data": {"shards": "", "image_size": 8, "batch_size": 1},
            "model": {"name": "dit", "size": "S/2"},
            "train": {"steps": 1},
        }
    )
    given = deepspeed_options(config, 1, 1, 1)
    ours = (*given, *(f"zero.{name.removeprefix('stage3_')}" for name in given["zero_optimization"]))
    derived = ("_", "global_rank", "world_size", "zero_optimization", "zero_enabled")
    values = vars(found) | {f"zero.{k}": v for k, v in found.zero_config.model_dump(mode="json").items()}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, int | float | str | bool | None) and not name.startswith((*ours, *derived))
    }
