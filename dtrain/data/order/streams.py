"""How many streams a data set is read in, where the config leaves it open (design, decision 1)."""

from dtrain.config import Data
from dtrain.data.shards.manifest import Manifest
from dtrain.errors import UserError

MIXED = 64  # streams of a mixed-in data set, at most


def default_streams(samples: int, most: int = 256) -> int:
    """One stream per 1,024 samples, at most 256.

    With 64, batches of 256 from 1,000 shards sorted by class were 1.2 times as far from the classes' shares as a
    uniform shuffle's; with 256, 0.9 times (`benchmarks/order.py`).
    """
    return min(most, max(1, samples // 1024))


def with_streams(data: Data, manifest: Manifest, begun: int | None = None) -> Data:
    """The section with `streams` resolved: as it says, else `begun`, else the default.

    begun: what a run that goes on has been read in. Raises UserError when there are more than samples.
    """
    streams = data.streams or begun or default_streams(manifest.samples)
    if streams > manifest.samples:
        raise UserError(f"data.streams {streams} exceeds the {manifest.samples} samples of {manifest.path}")
    return data.model_copy(update={"streams": streams})
