"""What can be combined with a frozen base: a copy that pictures control, or low-rank adapters."""

from typing import Any


def check(config: Any) -> None:
    """Raises ValueError where a `Config` names what cannot go with frozen weights beside, or with pictures."""
    of, pictures, e = getattr(config.model, "control_of", None), config.pictures, config.eval
    if pictures and not hasattr(config.model, "control_of"):
        raise ValueError(
            f"conditions.{next(iter(pictures))} is a picture, which controls a dit or a unet, and model.name is "
            f"{config.model.name}"
        )
    if bool(of) != bool(pictures):
        raise ValueError(
            f"model.control_of {of} needs a picture that controls it; add a section of conditions with kind picture"
            if of
            else f"conditions.{next(iter(pictures))} is a picture, and a trained copy of model.control_of takes it "
            "in; name a run or a file of weights there"
        )
    if unknown := e.control_scale.keys() - pictures.keys():
        known = ", ".join(pictures) or "this model has none"
        raise ValueError(f"eval.control_scale names {min(unknown)}, no picture of conditions; {known}")
    if e.guess_mode and e.guidance == 1:
        raise ValueError("eval.guess_mode has no effect with eval.guidance 1; take 3, or leave it out")
    if e.guess_mode and not pictures:
        raise ValueError("eval.guess_mode is of a model that a picture controls; leave it out")
    if config.base_source and config.run.init_from:
        raise ValueError("run.init_from: a model on frozen weights begins as these; leave it out")
    if getattr(config.model, "adapt", None):
        _adapters_fit(config)
    if not pictures:
        return
    alone = not config.model.num_classes and len(pictures) == len(config.conditions)
    if alone and e.guidance != 1 and not isinstance(e.guidance, str) and not e.guess_mode:
        raise ValueError(
            f"eval.guidance {e.guidance} leads away from no class and no words, and this model is told pictures "
            "alone; take eval.guess_mode true, which leads away from no picture"
        )
    for name, section in pictures.items():
        if section.operator and config.first_stage.reads_cache:
            raise ValueError(f"conditions.{name} is computed from pictures, and a cache holds none; take `field`")
        if section.grid and config.data.image_size % section.grid:
            raise ValueError(
                f"data.image_size {config.data.image_size} does not divide into {section.grid} cells a side "
                f"(conditions.{name}.grid)"
            )


def _adapters_fit(config: Any) -> None:
    if config.model.control_of:
        raise ValueError("model.adapt and model.control_of are two trainings; merge the one, then begin the other")
    if config.train.activation_checkpointing or config.train.compile:
        key = "compile" if config.train.compile else "activation_checkpointing"
        raise ValueError(f"train.{key} has no way through the layers that model.adapt adds to; set it to false")
