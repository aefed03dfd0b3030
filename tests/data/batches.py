"""What a loader hands out."""


def rows_of(batches) -> dict[int, dict[str, bytes]]:
    """k → name → the row's bytes, and no k twice."""
    rows = {}
    for batch in batches:
        for row, k in enumerate(batch["k"].tolist()):
            assert k not in rows
            rows[k] = {name: tensor[row].numpy().tobytes() for name, tensor in batch.items()}
    return rows
