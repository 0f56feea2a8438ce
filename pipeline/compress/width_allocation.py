"""Widths of all sites under a common budget.

Whole groups of channels go, and whole blocks where that is allowed, those first whose importance per saved cost is
lowest. The cost model counts the narrowed network exactly.
"""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.compress.budget import WINDOW, BudgetError, droppable, least_widths
from pipeline.config import Student
from pipeline.models.cost import CostModel, Term
from pipeline.models.spec import ArchSpec

Move = Mapping[str, int]
"""New widths of some sites."""


@dataclass(frozen=True)
class Site:
    """What a site can give up.

    Attributes:
        least: Channels it must keep.
        scores: Importance of the channels that are not committed, ascending.
    """

    least: int
    scores: np.ndarray


class WidthAllocation:
    """Widths of all sites under a common budget.

    Args:
        cost: Cost as a function of widths.
        full: Widths of the uncompressed network, all dimensions.
        sites: What may still be given up, by site.
        multiple: Widths are reduced to whole multiples of it.
        blocks: Groups of sites that may go together, whatever they must keep otherwise.
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
        """Return the allocation of a student that has given up nothing but its committed channels.

        Args:
            spec: The uncompressed network.
            config: Section of params.yaml.
            cost: What the budget counts.
            scores: Importance of the channels at each site that are not committed, in any order.
        """
        least = least_widths(spec, scores, config.channel_multiple)
        sites = {name: Site(least[name], np.sort(free.astype(np.float64))) for name, free in scores.items()}
        return cls(cost, spec.widths, sites, config.channel_multiple, droppable(spec, config, scores))

    @property
    def reduction(self) -> float:
        """Share of the cost that is gone at the present widths."""
        return 1 - self._cost(self.widths) / self._base

    def allocate(self, due: float, limit: float) -> None:
        """Give up what is cheapest until the reduction reaches `due`.

        Args:
            due: Reduction to reach.
            limit: Reduction not to exceed; a move that would is skipped.
        """
        prices = {name: self._price(name) for name in (*self._sites, *self._blocks)}
        reduction = self.reduction
        while reduction < due:
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

    def finalize(self, asked: float) -> None:
        """Reach the final reduction: in [asked, asked + `WINDOW`] at the lowest loss of importance.

        Allocates up to `asked`, then looks for the one or two moves (given up, or one given back for another) that land
        in the window at the lowest loss. Where none do, the two that come closest from below are made, and so on.

        Raises:
            BudgetError: If no moves lead there.
        """
        self.allocate(asked, limit=asked)
        while self.reduction < asked:
            reduction = self.reduction
            inside: tuple[float, Move] | None = None
            below: tuple[float, Move] | None = None
            singles = [move for name in (*self._sites, *self._blocks) for move in self._moves(name)]
            for pair in itertools.chain(((move,) for move in singles), itertools.combinations(singles, 2)):
                together = {site: width for move in pair for site, width in move.items()}
                if len(together) < sum(map(len, pair)):
                    continue
                reached = reduction + self._saving(together)
                if asked <= reached <= asked + WINDOW:
                    lost = self._lost(together)
                    inside = min(inside or (lost, together), (lost, together), key=lambda found: found[0])
                elif reduction < reached < asked:
                    below = max(below or (reached, together), (reached, together), key=lambda found: found[0])
            best = inside or below
            if best is None:
                raise BudgetError(
                    f"no widths in multiples of {self._multiple} give a reduction in [{asked:g}, {asked + WINDOW:g}] "
                    f"from {reduction:.4f}; change `student.budget.reduction` a little or lower "
                    "`student.channel_multiple`"
                )
            self.widths.update(best[1])

    def _next(self, name: str) -> Move:
        """Return the move that gives up the next group of a site, or a block; empty if nothing is left to give up."""
        if name in self._blocks:
            return dict.fromkeys(self._blocks[name], 0) if all(map(self.widths.get, self._blocks[name])) else {}
        smaller = (self.widths[name] - 1) // self._multiple * self._multiple
        return {name: smaller} if smaller >= self._sites[name].least else {}

    def _moves(self, name: str) -> list[Move]:
        """Return the next move of a site or block, and the one that gives back the last group of a site."""
        moves = [move] if (move := self._next(name)) else []
        if name in self._sites:
            larger = min(self.widths[name] + self._multiple, len(self._sites[name].scores))
            if 0 < self.widths[name] < larger:  # a removed block does not come back in part
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
