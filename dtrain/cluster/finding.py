"""What a check of `dtrain doctor` found."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    check: str
    status: Literal["ok", "warning", "bad"]
    found: str
    advice: str = ""  # what to do, where it is not ok


def ok(check: str, found: str) -> Finding:
    return Finding(check, "ok", found)


def warning(check: str, found: str, advice: str) -> Finding:
    return Finding(check, "warning", found, advice)


def bad(check: str, found: str, advice: str) -> Finding:
    return Finding(check, "bad", found, advice)
