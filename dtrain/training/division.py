"""How a global batch divides over ranks and micro-batches."""

from dtrain.errors import UserError


def rows_per_rank(batch: int, micro_batch: int | None, world_size: int) -> tuple[int, int]:
    """(rows of one rank per step, rows per micro-batch), or a UserError that names the nearest that divides.

    batch: data.batch_size. micro_batch: train.micro_batch, None for all rows of a rank at once.
    """
    if batch % world_size:
        below, above = batch - batch % world_size, batch + world_size - batch % world_size
        nearest = above if not below or above - batch < batch - below else below
        raise UserError(
            f"data.batch_size {batch} does not divide by {world_size} ranks; the nearest that does is {nearest}"
        )
    rows = batch // world_size
    micro = micro_batch or rows
    if rows % micro:
        fitting = [m for m in range(1, rows + 1) if rows % m == 0]
        nearest = min(fitting, key=lambda m: abs(m - micro))
        raise UserError(
            f"train.micro_batch {micro} does not divide the {rows} rows of a rank "
            f"(data.batch_size {batch} on {world_size} ranks); the nearest that does is {nearest}"
        )
    return rows, micro
