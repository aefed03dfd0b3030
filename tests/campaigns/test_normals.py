"""10⁸ normals of generator 2: python -m pytest -s -m campaign tests/campaigns/test_normals.py, with DTRAIN_SEED=N."""

import os

import pytest

from tests.normality import scores

NUMBERS = 100_000_000


@pytest.mark.campaign
def test_a_hundred_million_numbers_are_normal_and_independent():
    found = scores(NUMBERS, seed=int(os.environ.get("DTRAIN_SEED", "0")))
    print(", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    assert found.pop("ks") > 0.01
    assert max(map(abs, found.values())) < 3.5
