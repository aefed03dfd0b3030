"""Numbers as people read them."""

import math
from datetime import UTC, datetime


def short(value: float) -> str:
    """At most four significant digits: 0.8123, 12.35, 1.2e-05."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


def count(value: float) -> str:
    """A number of images on an axis: 128, 1.5k, 40M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def size(value: float) -> str:
    """Bytes as 512 B, 5.14 MB, 2.3 TB."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.4g} TB"


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 5 h 2 min, 3 d 4 h; what is zero is left out."""
    if not abs(seconds) < 1e12:
        return f"{seconds:.4g} s"
    if 0 < seconds < 10:
        return f"{seconds:.1f} s"
    seconds = round(seconds)
    sizes = [(seconds // 86400, "d"), (seconds // 3600 % 24, "h"), (seconds // 60 % 60, "min"), (seconds % 60, "s")]
    first = next((i for i, (value, _) in enumerate(sizes) if value), 3)
    return " ".join(f"{value} {unit}" for value, unit in sizes[first : first + 2] if value) or "0 s"


def clock(seconds: float) -> str:
    """Unix seconds as a date and time in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers from low to high, a step of 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / most
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def time_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Seconds from low to high at whole minutes, hours or days, where there are some."""
    unit = next((u for u in (86400, 3600, 60) if high - low >= 3 * u), 1)
    return [t * unit for t in ticks(low / unit, high / unit, most)]


def log_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """1, 2 and 5 times powers of ten from low to high, fewer where that would be too many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [m * 10.0**p for p in powers for m in digits if low * (1 - 1e-9) <= m * 10.0**p <= high * (1 + 1e-9)]
        if len(found) <= most:
            return found
    return found[:: -(-len(found) // most)]
