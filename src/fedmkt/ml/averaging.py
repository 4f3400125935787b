"""One adapter from the sites' adapters, coordinate by coordinate: a weighted mean, or rules that bear liars. No torch.

What is averaged are the LoRA factors A and B, each apart, as the paper's homogeneous scenario does and as FedAvg
(McMahan et al. 2017, arXiv 1602.05629) does with any weights. The layer's change is their product B A, and the product
of two means is not the mean of the products:

    mean(B) mean(A) = mean(B A) - mean((B - mean(B)) (A - mean(A)))

so the sites' changes are averaged up to a term of second order in how far they have drifted apart, which is small while
they start every round from one average. The same holds for the median and the trimmed mean, which are no linear rules
and have no exact form even in A and B alone. The mean of the products themselves has rank up to sites x r and would
need a truncation that is no simpler to defend (FlexLoRA, arXiv 2402.11505, does that).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmkt.errors import Refusal
from fedmkt.ml.adapters import MEANING, Adapter, AdaptersDiffer, check_fits, pack_adapter, unpack_adapter
from fedmkt.protocol import AverageRule

TRIMMED_SHARE = 0.2  # of the values of every coordinate, at either end
CAPPED_FROM = 3  # sites: with two, one of them is always at least half


@dataclass(frozen=True)
class Contribution:
    """A site's adapter as it was uploaded. samples: how many private samples the site says it has; > 0."""

    site: str
    blob: bytes
    samples: int


@dataclass(frozen=True)
class Average:
    """blob: the averaged adapter, None if no contribution could be used. left_out: site -> why."""

    blob: bytes | None
    left_out: dict[str, str]


def average_adapters(contributions: Sequence[Contribution], rule: AverageRule = "mean") -> Average:
    """The average of all that read, are finite, and fit to what most sites sent (the earliest, where as many differ).

    mean: weighted by private samples, a claim that `bounded_weights` bounds; a single adapter with huge values still
    moves it anywhere. median, trimmed_mean (Yin et al. 2018, arXiv 1803.01498): every site counts once; a coordinate
    stays between honest values as long as fewer than half of the sites lie (median), or as many as are trimmed at one
    end. One adapter alone comes back with the values it had. Raises ValueError where samples are not positive.
    """
    if any(one.samples <= 0 for one in contributions):
        raise ValueError(f"private samples must be positive, got {[one.samples for one in contributions]}")
    adapters, left_out = _readable(contributions)
    left_out |= _drop_misfits(adapters)
    if not adapters:
        return Average(None, left_out)
    weights = bounded_weights([one.samples for one in contributions if one.site in adapters])
    found = list(adapters.values())
    tensors = {name: _combine([each.tensors[name] for each in found], weights, rule) for name in found[0].tensors}
    return Average(pack_adapter(Adapter(found[0].config, tensors)), left_out)


def bounded_weights(samples: Sequence[int]) -> list[float]:
    """Shares that sum to 1. From three sites on none has more than half: what a site says of itself is not checked."""
    counts = [float(count) for count in samples]
    if len(counts) >= CAPPED_FROM:
        largest = counts.index(max(counts))
        counts[largest] = min(counts[largest], sum(counts) - counts[largest])
    return [count / sum(counts) for count in counts]


def trimmed_each_end(sites: int) -> int:
    """Values left out at either end: a fifth, at least one from three sites on, and never all."""
    return max(int(TRIMMED_SHARE * sites), 1) if sites >= CAPPED_FROM else 0


def _readable(contributions: Sequence[Contribution]) -> tuple[dict[str, Adapter], dict[str, str]]:
    adapters: dict[str, Adapter] = {}
    left_out: dict[str, str] = {}
    for one in contributions:
        try:
            adapters[one.site] = unpack_adapter(one.blob)
        except Refusal as error:
            left_out[one.site] = f"its adapter: {error.detail}"
    return adapters, left_out


def _drop_misfits(adapters: dict[str, Adapter]) -> dict[str, str]:
    """Takes out whoever differs from the most common settings and shapes, so that no single site sets the measure."""
    if not adapters:
        return {}
    kinds = {site: _kind(adapter) for site, adapter in adapters.items()}
    usual = Counter(kinds.values()).most_common(1)[0][0]
    model = adapters[next(site for site, kind in kinds.items() if kind == usual)]
    left_out: dict[str, str] = {}
    for site, adapter in list(adapters.items()):
        try:
            check_fits(adapter, model.config, _shapes(model))
        except AdaptersDiffer as error:
            left_out[site] = f"its adapter: {error.detail}"
            del adapters[site]
    return left_out


def _kind(adapter: Adapter) -> tuple[object, ...]:
    """Hashable, and equal only where `check_fits` finds nothing."""
    settings = [adapter.config.get(key) for key in MEANING]
    plain = [sorted(map(str, value)) if isinstance(value, list) else value for value in settings]
    return repr(plain), tuple(sorted(_shapes(adapter).items()))


def _shapes(adapter: Adapter) -> Mapping[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in adapter.tensors.items()}


def _combine(values: Sequence[NDArray[np.float32]], weights: Sequence[float], rule: AverageRule) -> NDArray[np.float32]:
    """One tensor of every site, all of one shape, in float64."""
    stacked: NDArray[np.float64] = np.stack(values).astype(np.float64)  # (sites, ...)
    if rule == "mean":
        stacked *= np.array(weights).reshape(-1, *(1 for _ in values[0].shape))
        combined = stacked.sum(axis=0)
    else:
        stacked.sort(axis=0)
        trimmed = (len(values) - 1) // 2 if rule == "median" else trimmed_each_end(len(values))
        combined = stacked[trimmed : len(values) - trimmed].mean(axis=0)
    return np.asarray(combined, dtype=np.float32)
