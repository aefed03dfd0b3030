"""Small trainings told in words, by each of the networks that attend to them."""

from dtrain.data.pack.pack import pack
from dtrain.data.pack.source import Choice
from tests.digits import tiny

NETWORKS = {
    "dit": "model={name: dit, depth: 1, width: 32, heads: 2, patch: 4}",
    "mmdit": "model={name: mmdit, depth: 2, width: 32, heads: 2, patch: 4}",
    "unet": "model={name: unet, width: 8, multipliers: [1, 2], attention: [8], res_blocks: 1}",
}
TEXT = "{field: txt, length: 12, width: 32, depth: 1, dropout: 0.5}"


def pack_pairs(folder):
    """scikit-learn's digits, two a picture, with their captions: 48 of them held out."""
    pack("sklearn:digit-pairs", folder / "all", holdout=48, choice=Choice(split="test"))
    return folder / "all"


def told_in_words(pairs, folder, network, *overrides):
    """Two conditions of bytes, each with a null of its own."""
    other = TEXT.replace("{", "{kind: text, null: zeros, ").replace("12", "44")
    shape = "data.image_size=16", "data.streams=1", NETWORKS[network]
    return tiny(pairs, folder, *shape, f"conditions={{text: {TEXT}, whole: {other}}}", *overrides)
