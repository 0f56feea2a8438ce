"""Distribution of a common budget over the widths of all sites.

Channels are removed in groups of `student.channel_multiple`, and blocks as a whole if that is allowed; the group or
block with the lowest importance per saved cost goes first. The cost model counts the narrowed network exactly.
"""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.compress.budget import WINDOW, BudgetError, minimum_widths, removable_blocks
from pipeline.config import Student
from pipeline.models.cost import CostModel, Term
from pipeline.models.spec import ArchSpec

Move = Mapping[str, int]
"""New widths of some sites."""


@dataclass(frozen=True)
class Site:
    """A site that may become narrower.

    Attributes:
        minimum: Smallest width, unless the whole block is removed.
        scores: Importance of the channels that are not committed, ascending.
    """

    minimum: int
    scores: np.ndarray


def allocate_budget(
    spec: ArchSpec, config: Student, scores: Mapping[str, np.ndarray], cost: CostModel
) -> dict[str, int]:
    """Return the widths of the whole network that keep the budget at the lowest loss of importance.

    The arguments and the error are those of `WidthAllocation.of` and `WidthAllocation.finalize`.
    """
    allocation = WidthAllocation.of(spec, config, cost, scores)
    allocation.finalize(config.budget.reduction)
    return allocation.widths


class WidthAllocation:
    """The widths of all sites under a common budget.

    Args:
        cost: Cost as a function of widths.
        full: Widths of all sites of the uncompressed network.
        sites: The sites that may become narrower.
        multiple: Widths are reduced to multiples of this number.
        blocks: Inner sites of each block that may be removed as a whole.
    """

    def __init__(
        self,
        cost: CostModel,
        full: Mapping[str, int],
        sites: Mapping[str, Site],
        multiple: int,
        blocks: Sequence[Sequence[str]] = (),
    ) -> None:
        self._cost = cost
        self._base = cost(full)
        self._sites = sites
        self._multiple = multiple
        self._blocks = {f"block of {block[0]}": tuple(block) for block in blocks}
        self.widths = {**full, **{name: len(site.scores) for name, site in sites.items()}}
        self._sums = {name: np.concatenate([[0.0], np.cumsum(site.scores)]) for name, site in sites.items()}
        self._terms: dict[str, list[Term]] = defaultdict(list)
        for term in cost.terms:
            for name in {term.left, term.right} & set(sites):
                self._terms[name].append(term)

    @classmethod
    def of(
        cls, spec: ArchSpec, config: Student, cost: CostModel, scores: Mapping[str, np.ndarray]
    ) -> "WidthAllocation":
        """Return the allocation that removes only the committed channels.

        Args:
            spec: The uncompressed network.
            config: Section `student` of params.yaml.
            cost: The cost that the budget limits.
            scores: Importance of the channels that are not committed, by site, in any order.
        """
        minimum = minimum_widths(spec, scores, config.channel_multiple)
        sites = {name: Site(minimum[name], np.sort(free.astype(np.float64))) for name, free in scores.items()}
        return cls(cost, spec.widths, sites, config.channel_multiple, removable_blocks(spec, config, scores))

    @property
    def reduction(self) -> float:
        """Share of the uncompressed network's cost that the present widths save."""
        return 1 - self._cost(self.widths) / self._base

    def allocate(self, target: float, limit: float) -> None:
        """Reduce widths greedily until the reduction reaches `target`; skip every move that would exceed `limit`."""
        prices = {name: self._price(name) for name in (*self._sites, *self._blocks)}
        reduction = self.reduction
        while reduction < target:
            affordable = [
                (price[0], name, price[1])
                for name, price in prices.items()
                if price is not None and reduction + price[1] <= limit
            ]
            if not affordable:
                return
            _, cheapest, saving = min(affordable)
            move = self._next(cheapest)
            self.widths.update(move)
            reduction += saving
            changed = {name for site in move for term in self._terms[site] for name in (term.left, term.right)}
            for name in prices:
                if changed & {name, *self._blocks.get(name, ())}:
                    prices[name] = self._price(name)

    def finalize(self, target: float) -> None:
        """Reach a reduction in [target, target + `WINDOW`] at the lowest loss of importance.

        Allocates up to `target`, then searches for one or two moves (removals, or a removal and a return) that land in
        the window at the lowest loss. If there are none, the moves that come closest from below are made, and the
        search is repeated.

        Raises:
            BudgetError: If no moves lead into the window.
        """
        self.allocate(target, limit=target)
        while self.reduction < target:
            reduction = self.reduction
            inside: tuple[float, Move] | None = None
            below: tuple[float, Move] | None = None
            singles = [move for name in (*self._sites, *self._blocks) for move in self._moves(name)]
            for pair in itertools.chain(((move,) for move in singles), itertools.combinations(singles, 2)):
                together = {site: width for move in pair for site, width in move.items()}
                if len(together) < sum(map(len, pair)):
                    continue
                reached = reduction + self._saving(together)
                if target <= reached <= target + WINDOW:
                    lost = self._lost(together)
                    inside = min(inside or (lost, together), (lost, together), key=lambda candidate: candidate[0])
                elif reduction < reached < target:
                    below = max(below or (reached, together), (reached, together), key=lambda candidate: candidate[0])
            best = inside or below
            if best is None:
                raise BudgetError(
                    f"no widths in multiples of {self._multiple} give a reduction in [{target:g}, {target + WINDOW:g}]:"
                    f" the closest below gives {reduction:.4f}; change `student.budget.reduction` slightly or lower "
                    "`student.channel_multiple`"
                )
            self.widths.update(best[1])

    def _next(self, name: str) -> Move:
        """Return the move that removes the next group of a site, or a block; empty if there is none."""
        if name in self._blocks:
            return dict.fromkeys(self._blocks[name], 0) if all(map(self.widths.get, self._blocks[name])) else {}
        smaller = (self.widths[name] - 1) // self._multiple * self._multiple
        return {name: smaller} if smaller >= self._sites[name].minimum else {}

    def _moves(self, name: str) -> list[Move]:
        """Return the next removal of a site or block, and the return of the last removed group of a site."""
        moves = [move] if (move := self._next(name)) else []
        if name in self._sites:
            larger = min(self.widths[name] + self._multiple, len(self._sites[name].scores))
            if 0 < self.widths[name] < larger:  # a removed block cannot return in part
                moves.append({name: larger})
        return moves

    def _saving(self, move: Move) -> float:
        """Return the share of the full cost that a move saves."""
        before = {**self._cost.fixed, **self.widths}
        after = {**before, **move}
        touched = {id(term): term for site in move for term in self._terms[site]}.values()
        return sum(term(before) - term(after) for term in touched) / self._base

    def _lost(self, move: Move) -> float:
        """Return the importance that a move loses; negative when channels come back."""
        lost = 0.0
        for site, width in move.items():
            full, sums = len(self._sites[site].scores), self._sums[site]
            lost += float(sums[full - width] - sums[full - self.widths[site]])
        return lost

    def _price(self, name: str) -> tuple[float, float] | None:
        """Return importance lost per saving, and the saving, of the next move of a site or block; None without one."""
        move = self._next(name)
        saving = self._saving(move)
        return (self._lost(move) / saving, saving) if saving > 0 else None
