"""Decide which matrix products of a graph are quantised to int8, by measurements against the reference.

All of them are, unless that misses :data:`~w2v_models.tolerances.TOLERANCES`. Then the products whose rounding changes
the frames most stay in fp32, as few as possible; a model that would need more than half of them in fp32 is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from w2v_export.graph.inference import InferenceGraph
from w2v_export.graph.quantised import QuantisedConv, QuantisedDense, quantisable
from w2v_export.graph.tensors import Dense
from w2v_export.graph.waveform import FirstConv, StridedConv
from w2v_export.precision.gate import lowest_cosines, run, worst_cosines
from w2v_models.errors import ParityError
from w2v_models.tolerances import TOLERANCES
from w2v_runtime.embedding.parity import Reference, comparable

PRECISION: Final = "int8"
#: The part of a cosine's tolerated distance from 1 that may be used here; the rest is for the engine's own rounding.
MARGIN: Final = 0.9
#: A layer is smoothed if its error with smoothing is below this fraction of that without.
_WORTH_SMOOTHING: Final = 0.7
#: The number of rows of a layer's input on which its error is measured.
_ROWS: Final = 256

Done = Callable[[int, int], None]


@dataclass(frozen=True)
class Plan:
    """The names of the products that are kept in fp32, and of those that are smoothed (SmoothQuant)."""

    kept: tuple[str, ...] = ()
    smoothed: tuple[str, ...] = ()


UNCHANGED: Final = Plan()


def quantise(graph: InferenceGraph, references: Sequence[Reference], rate: int, done: Done = lambda i, n: None) -> Plan:
    """Quantise the products of ``graph`` to int8, in place, as far as ``references`` at ``rate`` Hz allow.

    ``done(i, n)`` is called after the i-th of n steps.

    Raises:
        ParityError: the tolerance is missed even with half of the products in fp32.
    """
    references = sorted(comparable(references, PRECISION, rate), key=lambda reference: len(reference.waveform))
    turn_channels_last(graph)
    exact = quantisable(graph)
    smoothing = choose_smoothing(graph, references)
    rounded = {name: round_product(product, smoothing.get(name)) for name, product in exact.items()}
    install(graph, rounded)
    done(1, 2 + len(exact))
    kept: list[str] = []
    if not passes(graph, references):
        harm = {}
        install(graph, exact)
        for i, name in enumerate(exact):
            install(graph, {name: rounded[name]})
            harm[name] = 1 - lowest_cosines(graph, references[0])["frames"]
            install(graph, {name: exact[name]})
            done(2 + i, 2 + len(exact))
        kept = fewest_kept(graph, references, exact, rounded, sorted(harm, key=lambda name: -harm[name]))
    done(2 + len(exact), 2 + len(exact))
    return Plan(tuple(name for name in exact if name in kept), tuple(name for name in smoothing if name not in kept))


def fewest_kept(
    graph: InferenceGraph,
    references: Sequence[Reference],
    exact: Mapping[str, nn.Module],
    rounded: Mapping[str, nn.Module],
    by_harm: Sequence[str],
) -> list[str]:
    """Find by bisection the shortest prefix of ``by_harm`` that must stay in fp32; the graph is left in that state.

    Raises:
        ParityError: the tolerance is missed even with half of the products in fp32.
    """

    def enough(count: int) -> bool:
        install(graph, {**rounded, **{name: exact[name] for name in by_harm[:count]}})
        return passes(graph, references)

    low, high = 0, len(by_harm) // 2
    if not enough(high):
        cosines = {name: f"{value:.4f}" for name, value in worst_cosines(graph, references).items()}
        raise ParityError(
            f"int8 cannot be had within its tolerance: with {high} of {len(by_harm)} matrix products in fp32, the "
            f"smallest cosines are still {cosines}. Export this model without int8."
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    enough(high)
    return list(by_harm[:high])


def passes(graph: InferenceGraph, references: Sequence[Reference]) -> bool:
    """Whether the graph's frames, pooled vectors and layers are within ``MARGIN`` times the tolerance."""
    return all(
        1 - cosine <= MARGIN * (1 - TOLERANCES[PRECISION][output].min_cosine)
        for output, cosine in worst_cosines(graph, references).items()
    )


def round_product(product: Dense | StridedConv, smoothing: Tensor | None) -> nn.Module:
    """The int8 form of a product."""
    return QuantisedConv(product.conv) if isinstance(product, StridedConv) else QuantisedDense(product, smoothing)


def install(graph: InferenceGraph, products: Mapping[str, nn.Module]) -> None:
    """Replace modules of the graph, by name."""
    for name, product in products.items():
        parent, _, attribute = name.rpartition(".")
        setattr(graph.get_submodule(parent), attribute, product)


def turn_channels_last(graph: InferenceGraph) -> None:
    """Make the activations between the front end's convolutions channels-last, as quantised ones need them."""
    for module in graph.modules():
        if isinstance(module, FirstConv | StridedConv):
            module.channels_first = False


@torch.inference_mode()
def choose_smoothing(graph: InferenceGraph, references: Sequence[Reference]) -> dict[str, Tensor]:
    """The smoothing factors (k,) of the input channels, for each dense layer whose error they reduce enough.

    With a the largest magnitude of a channel on ``references`` and w that of its weights, the factor √(a / w) gives
    both the same range (Xiao et al. 2023, "SmoothQuant", with α = 1/2).
    """
    layers = {name: module for name, module in quantisable(graph).items() if isinstance(module, Dense)}
    largest: dict[str, Tensor] = {}

    def widen(name: str, layer: Dense, x: Tensor) -> None:  # noqa: ARG001
        magnitude = x.abs().flatten(0, -2).amax(0)
        largest[name] = torch.maximum(largest[name], magnitude) if name in largest else magnitude

    with _watching_inputs(layers, widen):
        for reference in references:
            run(graph, reference.waveform)
    factors = {name: _smoothing_factors(largest[name], layer.weight) for name, layer in layers.items()}
    gains: dict[str, float] = {}

    def compare(name: str, layer: Dense, x: Tensor) -> None:
        rows = x.flatten(0, -2)
        rows = rows[:: max(1, len(rows) // _ROWS)][None]
        plain, smooth = (_error(layer, QuantisedDense(layer, factor), rows) for factor in (None, factors[name]))
        gains[name] = max(gains.get(name, 0.0), smooth / max(plain, 1e-30))

    with _watching_inputs(layers, compare):
        run(graph, references[0].waveform)
    return {name: factors[name] for name in layers if gains[name] < _WORTH_SMOOTHING}


def _smoothing_factors(largest: Tensor, weight: Tensor) -> Tensor:
    return (largest.clamp(min=1e-5) / weight.abs().amax(1).clamp(min=1e-5)).sqrt()


def _error(layer: Dense, rounded: QuantisedDense, x: Tensor) -> float:
    """Root mean square of the rows' errors, each relative to the norm of the exact row."""
    expected, actual = layer.forward(x), rounded(x)  # calling the layer would run its hook again
    relative = (actual - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)
    return float(relative.square().mean().sqrt())


@contextmanager
def _watching_inputs(layers: dict[str, Dense], see: Callable[[str, Dense, Tensor], None]) -> Iterator[None]:
    """Call ``see`` with every input of the layers while the block runs."""

    def hook(name: str, layer: Dense) -> Any:
        return lambda module, arguments: see(name, layer, arguments[0])

    hooks = [layer.register_forward_pre_hook(hook(name, layer)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
