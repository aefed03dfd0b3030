"""What others named, as a terminal may be shown it: names of files, members, runs and classes are anybody's."""


def printable(text: object) -> str:
    """One line of it, with what a terminal would obey shown escaped, as `\\x1b`: line breaks, control characters, marks
    that turn the direction of writing, bytes that are no UTF-8.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def say(text: object) -> None:
    """Print text of one or more lines, each of them `printable`. A name in it that may hold a line break is made so
    where the line is made.
    """
    print("\n".join(map(printable, str(text).split("\n"))), flush=True)
