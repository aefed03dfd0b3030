"""Ranges left out of the order, against a list of numbers with these taken out."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dtrain.data.order.skipped import Skipped

ranges = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)).map(lambda r: (r[0], r[0] + r[1])), max_size=5)


@given(ranges, st.integers(0, 70), st.integers(0, 40))
def test_places_are_the_numbers_that_no_range_holds(left_out, first, count):
    kept = [k for k in range(400) if not any(a <= k < b for a, b in left_out)]
    skipped = Skipped(left_out)
    assert skipped.kept(first, count).tolist() == [k for k in kept if k >= first][:count]
    assert skipped.ordinal(np.arange(100)).tolist() == [sum(j < k for j in kept) for k in range(100)]
    assert [k for a, b in skipped.between(first, first + count) for k in range(a, b)] == [
        k for k in kept if first <= k < first + count
    ]
    assert all(a < b for a, b in skipped.between(first, first + count))


@given(ranges, st.integers(0, 70), st.integers(1, 9), st.integers(1, 9))
def test_batches_go_through_the_same_places_whatever_their_size(left_out, first, one, other):
    def walk(batch):
        skipped, images, seen = Skipped(left_out), first, []
        while len(seen) < 40:
            places = skipped.kept(images, batch).tolist()
            seen, images = seen + places, places[-1] + 1  # as a run stopped and resumed after every step
        return seen[:40]

    assert walk(one) == walk(other)
