"""A backbone whose attention and perceptrons are adapted by products of low rank, itself frozen (Hu et al. 2021).

    y = W x + b + (alpha / r) B A x,   A (r, in) and B (out, r) trained, B = 0 at the beginning

So a run begins as its base, bit for bit, and `merged` gives a plain backbone that computes the same.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dtrain.models.layers import MLP, Attention, CrossAttention, Linear, SwiGLU, normal
from dtrain.models.on_base import OnBase

# The modules whose linear layers are adapted, but for those of a condition's own network.
ADAPTED = (Attention, CrossAttention, MLP, SwiGLU)


class LowRank(nn.Module):
    """(N, …, in) → (N, …, out), through `rank` numbers."""

    def __init__(self, inputs: int, outputs: int, rank: int):
        super().__init__()
        self.A = Linear(inputs, rank, bias=False)
        self.B = Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.B(self.A(x.to(self.A.weight.dtype)))


def adapted_layers(backbone: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of a backbone that are adapted, by their names, in its order."""
    for name, module in backbone.named_modules():
        if isinstance(module, ADAPTED) and not name.startswith("conditions."):
            yield from (
                (f"{name}.{child}", layer) for child, layer in module.named_children() if isinstance(layer, nn.Linear)
            )


class Adapted(OnBase):
    """A frozen base with products beside its layers. Its parameters are those of the products alone."""

    def __init__(self, layers: Mapping[str, tuple[int, int]], rank: int, alpha: float):
        """layers: name → inputs and outputs of each layer that is adapted."""
        super().__init__()
        self.layers, self._names = nn.Module(), list(layers)
        self.scale = alpha / rank
        for name, (inputs, outputs) in layers.items():
            at, last = _place(self.layers, name)
            at.add_module(last, LowRank(inputs, outputs, rank))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, **condition: Tensor) -> Tensor:
        """As the base's."""
        condition.pop("keys", None)  # of dropout, which a frozen base has not
        with _adding(self):
            return self.base(x, t, y, **condition)

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        """The weights of a plain backbone that computes the same to rounding: name → tensor of the base's dtype."""
        found = {name: p.detach() for name, p in self.base.named_parameters()}
        for name, product in self.products().items():
            weight = found[f"{name}.weight"]
            found[f"{name}.weight"] = (weight.double() + product.to(weight.device)).to(weight.dtype)
        return found

    @torch.no_grad()
    def products(self) -> dict[str, Tensor]:
        """Layer → scale · B A, float64 (out, in)."""
        return {n: self.scale * one.B.weight.double() @ one.A.weight.double() for n, one in self.adapters()}

    def adapters(self) -> Iterator[tuple[str, LowRank]]:
        """By the names of the layers that they are of."""
        yield from ((name, self.layers.get_submodule(name)) for name in self._names)

    @staticmethod
    def initial_value(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """What the parameter called `name` begins as: A small and normal, B zero."""
        return torch.zeros(shape) if name.endswith(".B.weight") else normal(name, shape, seed, std=shape[1] ** -0.5)


@contextmanager
def _adding(network: Adapted) -> Iterator[None]:
    """Each adapted layer of the base adds its product, meanwhile: the base may stand under others too."""
    handles = []
    for name, adapter in network.adapters():

        def add(_, inputs: tuple[Tensor, ...], answer: Tensor, adapter=adapter) -> Tensor:
            return answer + network.scale * adapter(inputs[0])

        handles.append(network.base.get_submodule(name).register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _place(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that a dotted name lies in, made where it is not there, and the name's last part."""
    *way, last = name.split(".")
    for part in way:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]
    return root, last
