"""What others named, as a terminal may be shown it: names of files, members, runs and classes are anybody's."""

import sys


def printable(text: object) -> str:
    """One line of it, with what a terminal would obey shown escaped, as `\\x1b`: line breaks, control characters, marks
    that turn the direction of writing, bytes that are no UTF-8.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def printable_lines(text: object) -> str:
    """Text of one or more lines, each of them `printable`. A name in it that may hold a line break is made so where
    the line is made.
    """
    return "\n".join(map(printable, str(text).split("\n")))


def size(of_bytes: float) -> str:
    """Bytes in decimal units, as disks are sold: 4.19 MB."""
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    power = min(len(units) - 1, (len(f"{max(0, round(of_bytes)):d}") - 1) // 3)
    return f"{of_bytes / 1000**power:.3g} {units[power]}"


def say(text: object) -> None:
    """Print what a command was asked for, as `printable_lines`."""
    print(printable_lines(text), flush=True)


def tell(line: str) -> None:
    """Print a remark beside what a command was asked for: one line, to the standard error stream."""
    print(f"dtrain: {printable(line)}", file=sys.stderr, flush=True)
