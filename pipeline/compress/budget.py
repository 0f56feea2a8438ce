"""How wide each site may be so that the whole network keeps to its budget.

The user names a reduction; `scheduled` says how much of it must be masked by now, and `Allotment` spreads it over the
sites: whole groups of `multiple` channels go, those first whose retrieval contribution per saved cost is lowest. The
cost model counts the narrowed network exactly.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.config import Budget, Student
from pipeline.models.cost import CostModel, Term, macs_model, params_model
from pipeline.models.spec import ArchSpec, is_inner

WINDOW = 0.01
"""The final reduction lies in [asked, asked + WINDOW]."""


class BudgetError(ValueError):
    """A reduction that no choice of widths reaches."""

    exit_code = 2


class BudgetMissedError(RuntimeError):
    """A trained student that does not keep to its budget."""

    exit_code = 4


def scheduled(progress: float, start: float, end: float) -> float:
    """Share of the reduction that is due.

    Cubic: fast at first, while the network is wide, and slow at last (Zhu and Gupta, 2017, equation 1).

    Args:
        progress: Share of the training done, in [0, 1].
        start: Progress at which masking starts.
        end: Progress from which all of it is due.
    """
    passed = min(1.0, max(0.0, (progress - start) / (end - start)))
    return 1.0 - (1.0 - passed) ** 3


def least_widths(spec: ArchSpec, sites: Iterable[str], multiple: int) -> dict[str, int]:
    """Smallest width of each site: one multiple, or what it has where that is less."""
    return {site: min(multiple, spec.widths[site]) for site in sites}


def shrinking_sites(spec: ArchSpec, config: Student) -> tuple[str, ...]:
    """Dimensions that get a compactor or gate, from input to output.

    Raises:
        BudgetError: If there are none.
    """
    kinds = set(config.sites)
    found = tuple(name for name in spec.widths if (name.rpartition(".")[2] if is_inner(name) else "stream") in kinds)
    if not found:
        raise BudgetError(
            f"`student.sites` {config.sites} names no site of a ResNet-{spec.depth}, whose blocks are basic: add "
            "conv1 or stream"
        )
    return found


def cost_model(spec: ArchSpec, budget: Budget, size: tuple[int, int]) -> CostModel:
    """What the budget counts.

    Args:
        spec: The uncompressed network.
        budget: Section of params.yaml.
        size: Height and width of an image, pixels.
    """
    return params_model(spec) if budget.of == "params" else macs_model(spec, size)


def refuse_unreachable(spec: ArchSpec, config: Student, size: tuple[int, int]) -> None:
    """Complain before training about a budget that the structure cannot keep.

    Args:
        spec: The uncompressed network.
        config: Section of params.yaml.
        size: Height and width of an image, pixels.

    Raises:
        BudgetError: With the largest possible reduction and the layers that bind; or if there are no sites.
    """
    if config.method != "budget":
        return
    cost, multiple, reduction = cost_model(spec, config.budget, size), config.channel_multiple, config.budget.reduction
    sites = shrinking_sites(spec, config)
    floor = {**spec.widths, **least_widths(spec, sites, multiple)}
    possible = 1 - cost(floor) / cost(spec.widths)
    if reduction <= possible:
        return
    sizes = {**cost.fixed, **floor}
    weights: dict[str, int] = defaultdict(int)
    for term in cost.terms:
        weights[term.right] += term.coefficient * sizes[term.left] * sizes[term.right]
    binding = sorted(weights, key=lambda name: -weights[name])[:3]
    shares = ", ".join(f"{name} {weights[name] / cost(floor):.0%}" for name in binding)
    raise BudgetError(
        f"`student.budget.reduction` {reduction:g} cannot be reached: with every site at its least width the reduction "
        f"is {possible:.4f}, and what remains lies in {shares}; ask for less, add sites or lower "
        "`student.channel_multiple`"
    )


@dataclass(frozen=True)
class Site:
    """What a site offers.

    Attributes:
        width: Channels that are not yet given up for good.
        least: Channels it must keep.
        scores: Contributions of the `width` channels, ascending.
    """

    width: int
    least: int
    scores: np.ndarray


class Allotment:
    """Widths of all sites under a common budget.

    Args:
        cost: Cost as a function of widths.
        full: Widths of the uncompressed network, all dimensions.
        sites: What may still be given up, by site.
        multiple: Widths are reduced to whole multiples of it.
    """

    def __init__(self, cost: CostModel, full: Mapping[str, int], sites: Mapping[str, Site], multiple: int) -> None:
        self._cost = cost
        self._base = cost(full)
        self._sites = sites
        self._multiple = multiple
        self.widths = {**full, **{name: site.width for name, site in sites.items()}}
        self._sums = {name: np.concatenate([[0.0], np.cumsum(site.scores)]) for name, site in sites.items()}
        self._terms: dict[str, list[Term]] = defaultdict(list)
        for term in cost.terms:
            for name in {term.left, term.right} & set(sites):
                self._terms[name].append(term)

    @property
    def reduction(self) -> float:
        """Share of the cost that is gone at the present widths."""
        return 1 - self._cost(self.widths) / self._base

    def _next(self, site: str) -> int | None:
        """The next smaller width of a site, None at its least."""
        smaller = (self.widths[site] - 1) // self._multiple * self._multiple
        return smaller if smaller >= self._sites[site].least else None

    def _saving(self, site: str, channels: int) -> float:
        """Share of the full cost that `channels` channels of a site account for."""
        sizes = {**self._cost.fixed, **self.widths}
        others = sum(t.coefficient * sizes[t.right if t.left == site else t.left] for t in self._terms[site])
        return channels * others / self._base

    def _price(self, site: str) -> tuple[float, float] | None:
        """Contribution lost per saving, and the saving, of the next group of a site."""
        smaller = self._next(site)
        if smaller is None:
            return None
        gone = self._sites[site].width - self.widths[site]
        channels = self.widths[site] - smaller
        saving = self._saving(site, channels)
        lost = self._sums[site][gone + channels] - self._sums[site][gone]
        return float(lost) / saving, saving

    def spend(self, due: float, limit: float) -> None:
        """Give up the cheapest groups until the reduction reaches `due`, and never more than `limit`.

        Args:
            due: Reduction to reach.
            limit: Reduction not to exceed; a group that would is left alone.
        """
        prices = {site: self._price(site) for site in self._sites}
        reduction = self.reduction
        while reduction < due:
            open_sites = [
                (price[0], site, price[1])
                for site, price in prices.items()
                if price is not None and reduction + price[1] <= limit
            ]
            if not open_sites:
                return
            _, site, saving = min(open_sites)
            smaller = self._next(site)
            assert smaller is not None  # noqa: S101 - a site with a price has a smaller width
            self.widths[site] = smaller
            reduction += saving
            touched = {name for term in self._terms[site] for name in (term.left, term.right)} & set(self._sites)
            for name in touched:
                prices[name] = self._price(name)

    def settle(self, asked: float) -> None:
        """Reach the final reduction: at least `asked`, and above it by as little as costs least.

        Spends up to `asked`, then looks for the one or two groups (given up, or one given back for another) that land
        in the window at the lowest loss.

        Raises:
            BudgetError: If none does.
        """
        self.spend(asked, limit=asked)
        if self.reduction >= asked:
            return
        best: tuple[float, dict[str, int]] | None = None
        singles = [move for site in self._sites for move in self._moves(site)]
        for moves in itertools.chain(((move,) for move in singles), itertools.combinations(singles, 2)):
            if len({site for site, _ in moves}) < len(moves):
                continue
            trial = {**self.widths, **dict(moves)}
            excess = 1 - self._cost(trial) / self._base - asked
            if not 0 <= excess <= WINDOW:
                continue
            loss = sum(self._loss(site, width) for site, width in moves)
            if best is None or loss < best[0]:
                best = (loss, trial)
        if best is None:
            raise BudgetError(
                f"no widths in multiples of {self._multiple} give a reduction in [{asked:g}, {asked + WINDOW:g}] from "
                f"{self.reduction:.4f}; change `student.budget.reduction` a little or lower `student.channel_multiple`"
            )
        self.widths = best[1]

    def _moves(self, site: str) -> list[tuple[str, int]]:
        """Widths one group below and one group above the present one."""
        smaller, larger = self._next(site), min(self.widths[site] + self._multiple, self._sites[site].width)
        return [(site, width) for width in (smaller, larger) if width is not None and width != self.widths[site]]

    def _loss(self, site: str, width: int) -> float:
        """Contribution lost by going from the present width to another; negative when channels come back."""
        full = self._sites[site].width
        return float(self._sums[site][full - width] - self._sums[site][full - self.widths[site]])
