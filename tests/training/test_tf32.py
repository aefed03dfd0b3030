"""Which fp32 products may be TF32's is said to PyTorch, whatever it would do by itself."""

import pytest
import torch

from dtrain.training.tf32 import set_tf32, untimed_algorithms
from tests.digits import tiny
from tests.ranks import run_ranks


def said(which):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = which == "none"  # the opposite
    set_tf32(which)
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("none", (False, False, "highest")),
        ("convolutions", (False, True, "highest")),
        ("all", (True, True, "high")),
    ],
)
def test_products_and_convolutions_are_told_apart(which, expected):
    (found,) = run_ranks(said, 1, which)
    assert found == expected


def before_anything():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_the_default_is_what_pytorch_does_by_itself(digits, tmp_path):
    (alone,) = run_ranks(before_anything, 1)
    assert alone == run_ranks(said, 1, tiny(digits, tmp_path).train.tf32)[0][:2]


def test_no_algorithm_is_chosen_by_its_time_while_images_are_drawn():
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with untimed_algorithms():
            assert not torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.benchmark = before
