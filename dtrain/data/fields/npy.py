"""The .npy files of samples: one array of a dtype and shape that are known before."""

import io
import math
import tokenize

import numpy as np

from dtrain.errors import BadSample

# What NumPy lets through for a header that is none, seen on mutated files.
_BAD_HEADER = (ValueError, TypeError, SyntaxError, KeyError, EOFError, OverflowError, MemoryError, RecursionError)
_BAD_HEADER += (tokenize.TokenError,)


def read_array(data: bytes, dtype: str, shape: list[int]) -> np.ndarray:
    """A .npy file's array, which must have this dtype and shape: nothing is allocated for what its header promises.

    Raises BadSample. No pickle is read: an array of objects would run code.
    """
    got_shape, got_dtype, fortran, start = _header(data)
    if got_dtype != dtype or list(got_shape) != shape:
        raise BadSample(f"holds {got_dtype} {list(got_shape)}, not {dtype} {shape}")
    values = data[start:]
    if len(values) != got_dtype.itemsize * math.prod(shape):
        raise BadSample(f"is no .npy array that can be read (it has {len(values)} bytes of values for {dtype} {shape})")
    array = np.frombuffer(values, got_dtype).reshape(shape, order="F" if fortran else "C")
    return array.astype(dtype)  # in the machine's byte order, and a copy that may be written to


def header(data: bytes) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype) that a .npy file says its array has. Raises BadSample."""
    shape, dtype, _, _ = _header(data)
    return shape, dtype


def _header(data: bytes) -> tuple[tuple[int, ...], np.dtype, bool, int]:
    """(shape, dtype, whether in Fortran's order, where the values begin)."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read_header:
            raise ValueError(f"version {version[0]}.{version[1]} of the format is not known")
        shape, fortran, dtype = read_header[version](file)
        if dtype.hasobject:
            raise ValueError("it holds pickled objects, which only allow_pickle=True would load")
    except _BAD_HEADER as e:
        reason = str(e).splitlines()[0] if str(e) else "it is cut off"
        raise BadSample(f"is no .npy array that can be read ({reason})") from None
    return shape, dtype, fortran, file.tell()
