"""`dtrain sample`: images of a run into a PNG grid or an .npz file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dtrain import distributed
from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.evaluation.evaluate import open_sampler, weights_name
from dtrain.evaluation.generate import grid
from dtrain.run import RunDirectory


def draw_to_file(
    run: RunDirectory,
    config: Config,
    n: int,
    label: int | None,
    step: int | None,
    out: Path,
    on_block: Callable[[int, int], None],
) -> None:
    """Draw n images, labels in turn or all `label`, in blocks dealt to ranks; rank 0 writes `out`.

    .npz holds `images` uint8 (N, H, W, C) and `labels` int64 (N,). Raises UserError where `out` cannot be written.
    """
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.absolute().parent}")
    distributed.initialize()
    sampler = open_sampler(run, config, weights_name(config), distributed.device(), step).sampler
    classes = max(1, config.model.num_classes)
    labels = torch.arange(n) % classes if label is None else torch.full((n,), label)
    size = config.eval.batch_size
    starts = range(0, n, size)[distributed.rank() :: distributed.world_size()]
    mine = {}
    for done, start in enumerate(starts):
        ids = list(range(start, min(start + size, n)))
        mine[start] = sampler.draw(ids, labels[ids], config.eval).numpy()
        on_block(done + 1, len(starts))
    blocks = {start: block for part in distributed.gather_objects(mine) for start, block in part.items()}
    if distributed.rank() != 0:
        return
    images = np.concatenate([blocks[start] for start in sorted(blocks)])
    try:
        if out.suffix == ".npz":
            np.savez(out, images=images.transpose(0, 2, 3, 1), labels=labels.numpy())
        else:
            columns = classes if label is None and 1 < classes <= 16 else int(np.ceil(np.sqrt(n)))
            grid(torch.from_numpy(images), columns, scale=max(1, 32 // config.data.image_size)).save(out)
    except OSError as e:
        raise UserError(f"cannot write --out {out}: {e.strerror}") from None
