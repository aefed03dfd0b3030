"""What others named, as a terminal may be shown it: names of files, members, runs and classes are anybody's."""


def printable(text: object) -> str:
    """One line of it, with what a terminal would obey shown escaped, as `\\x1b`: line breaks, control characters, marks
    that turn the direction of writing, bytes that are no UTF-8.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
