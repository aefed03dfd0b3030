"""Folders and packed data sets, as tests of packing write and read them."""

from pathlib import Path

from tests.data.shard_files import samples_of


def shards_in(folder):
    """Every tar below the folder; also while folders in it come and go."""
    try:
        return list(folder.rglob("*.tar"))
    except FileNotFoundError:
        return []


def lay(folder: Path, files: dict[str, bytes]) -> Path:
    """Write these files, each with the folders that it needs."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def packed_names(folder: Path, source: Path) -> dict[str, int | None]:
    """Name below `source` → label or None, of each file that was packed; found again by its bytes."""
    names = {f.read_bytes(): str(f.relative_to(source)) for f in source.rglob("*") if f.is_file()}
    found = {}
    for split in ("train", "holdout"):
        if (folder / split).exists():
            for sample in samples_of(folder / split):
                image = next(sample[f] for f in ("jpg", "png", "webp") if f in sample)
                found[names[image]] = int(sample["cls"]) if "cls" in sample else None
    return found
