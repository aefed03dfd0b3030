"""Two of scikit-learn's digits beside each other, with a caption that says which: words and pictures for a laptop."""

import numpy as np

from dtrain.data.pack.source import Choice, Source, arrays
from dtrain.errors import UserError
from dtrain.randomness import Draws

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE, DIGIT = 16, 8
EACH = 100  # pictures of an ordered pair
SPLITS = ("train", "test")
_SEED, _PURPOSE = 0, 1  # of draws of this file's own


def is_held_out(left: int, right: int) -> bool:
    """Whether this ordered pair is one of the 20 of 100 of the split `test`: each digit is in two on either side."""
    return (left + 3 * right) % 5 == 0


def caption(left: int, right: int) -> str:
    return f"the digit {NAMES[left]} left of the digit {NAMES[right]}"


def pairs(split: str) -> list[tuple[int, int]]:
    """The ordered pairs of a split."""
    every = [(left, right) for left in range(10) for right in range(10)]
    return [pair for pair in every if is_held_out(*pair) == (split == "test")]


def digit_pairs(choice: Choice) -> Source:
    """16×16 grey pictures, each digit drawn from scikit-learn's 1,797 in the middle of its half. Raises UserError."""
    from sklearn.datasets import load_digits

    split = choice.split or SPLITS[0]
    if split not in SPLITS:
        raise UserError(f"sklearn:digit-pairs has no split {split}; it holds {', '.join(SPLITS)}")
    digits = load_digits()
    levels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    of_class = [np.flatnonzero(digits.target == number) for number in range(10)]
    draws, images, captions = Draws(_SEED), [], []
    top = (SIDE - DIGIT) // 2
    for left, right in pairs(split):
        for number in range(EACH):
            picture = np.zeros((SIDE, SIDE), np.uint8)
            for place, digit in enumerate((left, right)):
                u = draws.uniform(_PURPOSE, (left * 10 + right) * EACH + number, place)
                chosen = of_class[digit][int(u * len(of_class[digit]))]
                picture[top : top + DIGIT, place * DIGIT : (place + 1) * DIGIT] = levels[chosen]
            images.append(picture)
            captions.append(caption(left, right))
    (other,) = set(SPLITS) - {split}
    notes = (f"took the split {split}, {len(pairs(split))} of the 100 ordered pairs; beside it: {other}",)
    return arrays(np.stack(images), None, None, captions, notes=notes)
