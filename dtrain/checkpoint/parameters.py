"""What a checkpoint calls the parameters of several networks, and whether they are those of the networks at hand.

Those of the backbone carry no prefix, so a checkpoint of one network says the module's own names; those of another
network are "<network>/<parameter>".
"""

from collections.abc import Mapping

from dtrain.checkpoint.format import Checkpoint
from dtrain.errors import UserError

BACKBONE = "backbone"


def full_name(network: str, parameter: str) -> str:
    return parameter if network == BACKBONE else f"{network}/{parameter}"


def split_name(name: str) -> tuple[str, str]:
    """(network, parameter) of a full name."""
    network, slash, parameter = name.partition("/")
    return (network, parameter) if slash else (BACKBONE, name)


def check_same(checkpoint: Checkpoint, ours: Mapping[str, int]) -> None:
    """Raises UserError where a checkpoint's parameters are not exactly ours: full name → number of elements."""
    _compare(checkpoint, _parameters(checkpoint), ours)


def check_weights(checkpoint: Checkpoint, ours: Mapping[str, int], key: str) -> None:
    """Raises UserError where a new run with our networks cannot begin with a checkpoint's weights `key`.

    It needs the backbone, with that average; of other networks those that both have must be the same.
    """
    of_backbone = (name for name in checkpoint.tensors if split_name(name)[0] == BACKBONE)
    if key != "fp32" and not any(name.endswith(f":{key}") for name in of_backbone):
        raise UserError(f"{checkpoint.path} holds no weights {key}")
    theirs = _parameters(checkpoint)
    there, here = ({split_name(name)[0] for name in names} for names in (theirs, ours))
    wanted = (there | {BACKBONE}) & here
    theirs, ours = ({name: n for name, n in sizes.items() if split_name(name)[0] in wanted} for sizes in (theirs, ours))
    _compare(checkpoint, theirs, ours)


def _parameters(checkpoint: Checkpoint) -> dict[str, int]:
    return {n.removesuffix(":fp32"): size for n, size in checkpoint.tensors.items() if n.endswith(":fp32")}


def _compare(checkpoint: Checkpoint, theirs: Mapping[str, int], ours: Mapping[str, int]) -> None:
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise UserError(
                f"{checkpoint.path} is of another model: {name} has {theirs.get(name, 'no')} elements there, "
                f"{ours.get(name, 'none')} here"
            )
