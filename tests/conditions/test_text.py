"""Words as a condition: dropped by a draw of its own, one null in training and in sampling, guidance and what it leads
away from."""

from functools import partial

import pytest
import torch

from dtrain.conditions.build import Conditions
from dtrain.conditions.classes import Classes
from dtrain.conditions.text import Trained, Words
from dtrain.config import load
from dtrain.data.fields.caption import Caption
from dtrain.data.fields.tokens import Bytes
from dtrain.diffusion.guidance import guided
from dtrain.draws import purpose_of
from dtrain.errors import UserError
from dtrain.randomness import Draws
from tests.digits import CONFIG
from tests.models.told import E, inputs, told_in_words, two_texts_and_a_class

N, L = 3, 6


def condition(name="text", dropout=0.2, null_is_empty=False):
    return Words(Caption(name, "txt", L, Bytes()), Trained(L), dropout, null_is_empty)


class Spread:
    """A stand-in for a frozen encoder: each token as E numbers."""

    dtype, fingerprint, shape = torch.float64, None, (L, E)

    def __call__(self, tokens, mask):
        return torch.sin(tokens[..., None] * torch.arange(1, E + 1, dtype=torch.float64))


def frozen_condition(name):
    return Words(Caption(name, "txt", L, Bytes()), Spread(), 0.1, False)


def batch(words, *parts):
    found = {part.name: part.rows(words) for part in parts}
    for part in parts:
        draws, purpose = Draws(0), purpose_of(f"conditions.{part.name}.drop")
        found[f"{part.name}_drop"] = torch.tensor([draws.uniform(purpose, k) for k in range(len(words))])
    return found


def test_each_of_several_is_dropped_as_often_as_it_says_and_by_itself():
    n = 4000
    one, two = condition("one", 0.1), condition("two", 0.3)
    found = Conditions([one, two]).of_batch(batch(["a"] * n, one, two))
    gone = {name: ~found[f"{name}_mask"].any(1) for name in ("one", "two")}
    for share, expected in (
        (gone["one"], 0.1),
        (gone["two"], 0.3),
        (gone["one"] & gone["two"], 0.03),
    ):
        assert abs(share.double().mean() - expected) < 4 * (expected / n) ** 0.5


@pytest.mark.parametrize("null_is_empty", [False, True])
def test_nothing_is_the_same_in_training_in_sampling_and_for_an_image_without_words(null_is_empty):
    part = condition(dropout=1.0, null_is_empty=null_is_empty)
    trained = part.dropped(part.given(batch(["a", "b c"], part)), batch(["a", "b c"], part))
    sampled = part.null(part.given(batch(["d", "e"], part)))
    unasked = part.of_ids([0, 1], torch.zeros(2))
    wordless = part.given(batch(["", " "], part))
    for other in (sampled, unasked, wordless):
        assert trained.keys() == other.keys()
        assert all(torch.equal(trained[name], other[name]) for name in trained)
    assert int(trained["text_mask"].sum()) == (2 if null_is_empty else 0)  # the token that begins an empty caption


def test_guidance_1_is_the_conditional_model_and_3_leads_away_from_the_null():
    model, conditions = told_in_words(), Conditions([condition()])
    said = conditions.of_ids([0, 1, 2], torch.zeros(3), {"text": ["ab", "c", "defg"]})
    bare = model(*inputs(), **said)
    assert torch.equal(guided(model, 1.0, conditions.null)(*inputs(), **said), bare)
    nothing = model(*inputs(), **conditions.null(said))
    expected = nothing + 3 * (bare - nothing)
    assert torch.allclose(guided(model, 3.0, conditions.null)(*inputs(), **said), expected, atol=1e-10)


def test_a_negative_prompt_stands_in_the_place_of_the_null():
    model, conditions = told_in_words(), Conditions([condition()])
    said = conditions.of_ids([0, 1, 2], torch.zeros(3), {"text": ["ab", "c", "defg"]})
    other = conditions.of_ids([0, 1, 2], torch.zeros(3), {"text": ["not"] * 3})
    away = conditions.null(said, "not")
    assert all(torch.equal(away[name], other[name]) for name in other)
    bare, nothing = model(*inputs(), **said), model(*inputs(), **other)
    found = guided(model, 3.0, lambda told: conditions.null(told, "not"))(*inputs(), **said)
    assert torch.allclose(found, nothing + 3 * (bare - nothing), atol=1e-10)


def test_the_key_null_is_read_from_yaml_without_quotes():
    own = "model.num_classes=0", "conditions={text: {null: zeros, dropout: 0.2}}"
    section = load(CONFIG, ["data.shards=d", "data.holdout=null", "eval.every=0", *own]).conditions["text"]
    assert (section.null, section.width) == ("zeros", 128)


def test_guidance_leads_to_words_and_class_apart_and_a_negative_prompt_stands_where_words_are_not_told():
    model = two_texts_and_a_class()
    parts = Classes(4, 0.1), frozen_condition("one"), frozen_condition("two")
    conditions = Conditions(parts, ["label", "one", "two"])
    said = conditions.of_ids([0, 1, 2], torch.tensor([0, 3, 1]), {"one": ["ab", "c", "defg"], "two": ["x", "", "zz"]})
    null = partial(conditions.null, negative="no")

    def of(*told):
        return model(*inputs(), **null(said, told=told))

    found = guided(model, "one=3,label=1.5,two=2", null)(*inputs(), **said)
    both = of("one", "label")
    expected = of() + 3 * (of("one") - of()) + 1.5 * (both - of("one")) + 2 * (model(*inputs(), **said) - both)
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)
    plain = guided(model, 3.0, null)(*inputs(), **said)
    assert torch.equal(plain, guided(model, "one=3,label=3,two=3", null)(*inputs(), **said))
    assert not torch.allclose(found, plain, atol=1e-3)
    without = null(said, told=("one",))
    other = conditions.of_ids([0, 1, 2], torch.tensor([4, 4, 4]), {"one": ["ab", "c", "defg"], "two": ["no"] * 3})
    assert all(torch.equal(without[name], other[name]) for name in other)


def test_prompts_for_a_model_that_is_not_told_in_words_are_refused():
    with pytest.raises(UserError, match="not told in words"):
        Conditions().saying(["a"])
