import numpy as np
import pytest
import torch

from dtrain.config import UNet
from dtrain.models.dropout import dropout
from dtrain.randomness import Draws, Purpose, drawn

K = torch.arange(1000, 1064)


def dropout_keys(seed, k):
    """As they come in a batch: what a UNet declares, drawn for these images."""
    draw = UNet(name="unet", width=32, dropout=0.1).draws()["keys"]
    return torch.from_numpy(drawn(draw, Draws(seed), k.tolist(), k.numpy(), 0, len(k)))


def by_hand(key, layer, element, probability):
    """Whether an element is kept, in Python's unbounded integers."""

    def mixed(h):
        h ^= h >> 16
        h = h * 0x7FEB352D % 2**32
        h ^= h >> 15
        h = h * 0x846CA68B % 2**32
        return h ^ h >> 16

    low, high = key & 0x7FFFFFFF, (key >> 32) & 0x7FFFFFFF
    h = mixed((mixed(element ^ mixed(low ^ mixed(layer + 1))) + high) % 2**32)
    return h % 2**31 >= int(probability * 2**31)


def test_the_mask_is_the_hash_of_key_layer_and_element():
    keys = torch.tensor([0, 1, -1, 2**62 + 12345, -(2**63)])
    found = dropout(torch.ones(5, 2, 3, 7), 0.4, keys, layer=3)
    for row, key in enumerate(keys.tolist()):
        expected = [by_hand(key % 2**64, 3, i, 0.4) / 0.6 for i in range(42)]
        np.testing.assert_allclose(found[row].flatten(), expected, rtol=1e-6)


def test_keys_are_the_draws_of_seed_and_k():
    words = [int(Draws(3).words(Purpose.DROPOUT, k)[0]) for k in (0, 7, 10**12)]
    assert [key % 2**64 for key in dropout_keys(3, torch.tensor([0, 7, 10**12])).tolist()] == words
    assert not torch.equal(dropout_keys(3, K), dropout_keys(4, K))


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_elements_are_dropped_at_the_rate_and_the_mean_is_kept(probability):
    x = torch.ones(64, 16, 16, 16)
    out = dropout(x, probability, dropout_keys(0, K), layer=1)
    n, dropped = x.numel(), float((out == 0).double().mean())
    assert abs(dropped - probability) < 5 * np.sqrt(probability * (1 - probability) / n)
    assert set(out.unique().tolist()) == {0.0, float(torch.tensor(1 / (1 - probability)))}
    per_row, per_element = (out == 0).double().flatten(1).mean(1), (out == 0).double().mean(0).flatten()
    for rates, draws in ((per_row, 4096), (per_element, 64)):
        expected = probability * (1 - probability) / draws
        assert float(rates.var()) == pytest.approx(expected, rel=6 * np.sqrt(2 / len(rates)))


def test_rows_layers_and_neighbours_are_independent():
    x, keys = torch.ones(64, 4096), dropout_keys(0, K)
    first, second = ((dropout(x, 0.5, keys, layer) > 0).double() - 0.5 for layer in (1, 2))
    limit = 5 * 0.25 / np.sqrt(x.numel())
    pairs = [(first, second), (first[:-1], first[1:]), (first[:, :-1], first[:, 1:]), (first[:, :-64], first[:, 64:])]
    for a, b in pairs:
        assert abs(float((a * b).mean())) < limit * 1.1


def test_a_gradient_flows_through_what_is_kept_alone():
    x = torch.ones(4, 100, requires_grad=True)
    out = dropout(x, 0.25, dropout_keys(0, K[:4]), layer=1)
    out.sum().backward()
    torch.testing.assert_close(x.grad, out.detach())
