"""What lies in a folder, for comparing two."""

from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """Path within the folder → bytes, of every file."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
