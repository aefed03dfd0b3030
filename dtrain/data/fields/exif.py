"""How a picture is to be turned, by the orientation that its EXIF data say. Imports no torch and no NumPy."""

import struct

PREFIX = b"Exif\0\0"  # before the TIFF structure: in a JPEG always, in a WebP sometimes
AS_STORED = 1
_ORIENTATION = 0x0112
_TIFF = {b"II*\0": "<", b"MM\0*": ">", b"II\0*": "<", b"MM*\0": ">"}  # the latter two are wrong, and read by all
_INTEGERS = {1: "B3x", 3: "H2x", 4: "I"}  # kind of a value → how its four bytes hold it
_ENTRY = 12  # bytes


def orientation(exif: bytes) -> int:
    """1 to 8 of EXIF data, with or without their prefix; 1, as stored, where they say nothing or nothing valid.

    1 is upright, 3 upside down, 6 and 8 a quarter turn; 2, 4, 5 and 7 are mirrored ones. EXIF 3.0, 4.6.5.1.6.
    """
    tiff = exif.removeprefix(PREFIX)
    order = _TIFF.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return AS_STORED
    (at,) = struct.unpack(order + "I", tiff[4:8])
    count, found = int.from_bytes(tiff[at : at + 2], "little" if order == "<" else "big"), AS_STORED
    entries = tiff[at + 2 : at + 2 + count * _ENTRY]
    for tag, kind, number, value in struct.iter_unpack(order + "HHI4s", entries[: len(entries) // _ENTRY * _ENTRY]):
        if tag == _ORIENTATION and number == 1 and kind in _INTEGERS:
            (found,) = struct.unpack(order + _INTEGERS[kind], value)
    return found if 1 <= found <= 8 else AS_STORED
