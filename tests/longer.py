"""Cases of a parametrized test that only `make campaigns` runs: each guarantee keeps some in every run of the suite."""

import pytest


def longer(*values):
    return pytest.param(*values, marks=pytest.mark.campaign)


def mostly_longer(cases, stay) -> list:
    """All the cases, of which only those in `stay` are run every time."""
    cases, stay = list(cases), list(stay)
    assert all(case in cases for case in stay)
    return [case if case in stay else longer(*(case if isinstance(case, tuple) else (case,))) for case in cases]
