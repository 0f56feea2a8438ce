"""Promotions: which versions of a model became champion, in which order, and whether somebody changed that by hand.

MLflow creates a version together with its tags in one transaction and numbers it; the tags record whether the version
passed the gate and which promotion it follows (`gate`, `replaces`). Everybody therefore sees promotions in the same
order. A version that does not follow the last one was overtaken, does not count, and is compared again. A rollback is a
version too (`restores`), like the commit that `git revert` makes.

The alias, and tags that are written later, cannot give that order, because MLflow overwrites both unconditionally:
2 and 3 pass against 1, 2 becomes champion, then the promoter of 3 moves the alias and is killed before it reads again.
Version 3 is left as champion, although it fails against 2. The alias is therefore only a copy of what the versions
record: it may lag behind by one command, but never stands at a version that failed.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from mlflow.entities.model_registry import ModelVersion, RegisteredModel

CHAMPION, CHALLENGER, BEST = "champion", "challenger", "best"
GATE, PASSED, REASON, REPLACES, RESTORES = "gate", "passed", "reason", "replaces", "restores"
"""Tags of a version; `best` is one, too."""
NONE, ITSELF = "none", "itself"
PROMOTED, SHOWN = "promoted", "shown"
"""Tags of the registered model (version that records the last promotion) and of a version (its aliases were set)."""


@dataclass(frozen=True)
class Promotion:
    """A change of the champion.

    Attributes:
        number: Version that records it.
        version: Champion from then on; an earlier one than `number` after a rollback.
        best: Version with the best mAP until then.
        action: `promote` or `rollback`.
        reason: In one sentence.
        when: In UTC.
    """

    number: str
    version: str
    best: str
    action: str
    reason: str
    when: datetime

    @classmethod
    def of(cls, one: ModelVersion) -> "Promotion":
        """Read the tags of the version that records it."""
        number, tags = str(one.version), one.tags
        version, best = tags.get(RESTORES, number), tags.get(BEST, ITSELF)
        action = "rollback" if RESTORES in tags else "promote"
        when = datetime.fromtimestamp(one.creation_timestamp / 1000, UTC)
        return cls(number, version, version if best == ITSELF else best, action, tags.get(REASON, ""), when)


@dataclass
class Lineage:
    """What the versions of a model record.

    Attributes:
        versions: All that are not deleted, by number.
        promotions: Valid ones, the first one first.
        champions: Those that a rollback can go back to; the last one is in use.
        withdrawn: Versions that a rollback took back.
        gap: Deletion that makes the order of promotions unknown; empty where there is none.
    """

    versions: dict[str, ModelVersion]
    promotions: list[Promotion] = field(default_factory=list)
    champions: list[Promotion] = field(default_factory=list)
    withdrawn: set[str] = field(default_factory=set)
    gap: str = ""

    @classmethod
    def of(cls, versions: Iterable[ModelVersion]) -> "Lineage":
        """Follow the promotions of versions in ascending order."""
        found = cls({str(one.version): one for one in versions})
        for number, one in found.versions.items():
            before = one.tags.get(REPLACES, NONE)
            if one.tags.get(GATE) != PASSED or not one.tags.keys() & {REPLACES, RESTORES}:
                continue
            if RESTORES in one.tags or (before == found.last and not found.gap):
                found._add(Promotion.of(one))
            elif before != NONE and before not in found.versions:
                found.gap = f"version {before}, which version {number} replaced, was deleted in MLflow"
        return found

    def _add(self, made: Promotion) -> None:
        if made.action == "rollback":  # takes back those after the version, or the present one if it is none of them
            names = [one.version for one in self.champions]
            others = len(names) if self.gap else len(names) - 1
            kept = names.index(made.version) if made.version in names else others
            self.withdrawn = self.withdrawn.union(names[kept:]) - {made.version}
            self.champions = self.champions[:kept]
            self.gap = ""
        self.promotions.append(made)
        self.champions.append(made)

    @property
    def last(self) -> str:
        """Version that records the last promotion."""
        return self.promotions[-1].number if self.promotions else NONE

    @property
    def champion(self) -> Promotion | None:
        """The one in use."""
        return self.champions[-1] if self.champions else None

    @property
    def passed(self) -> list[str]:
        """Versions that passed the gate, and so may be named champion."""
        return [
            name for name, one in self.versions.items() if one.tags.get(GATE) == PASSED and RESTORES not in one.tags
        ]

    def problem(self, model: RegisteredModel) -> str:
        """What was deleted or moved in MLflow; empty where nothing was.

        Args:
            model: As it was before the versions were read, so that a promotion in between is no problem.
        """
        alias, shown, now = model.aliases.get(CHAMPION), model.tags.get(PROMOTED), self.champion
        if self.gap:
            return self.gap
        if shown is not None and shown not in [one.number for one in self.promotions]:
            return f"version {shown}, the last one that was promoted, was deleted in MLflow, or its tags were"
        if now is None:
            return f"alias `{CHAMPION}` is at version {alias}, whose promotion is not recorded" if alias else ""
        if missing := {now.version, now.best} - self.versions.keys():
            return f"version {min(missing)}, the champion or the best one so far, was deleted in MLflow"
        # A promoter that is slow, or was killed before it noted `shown`, may have set the alias last.
        late = {one.version for one in self.promotions if SHOWN not in self.versions[one.number].tags}
        if shown == now.number and str(alias) not in late | {now.version}:
            became = f"moved to version {alias}" if alias else "deleted"
            return f"alias `{CHAMPION}` was {became} in MLflow, but version {now.version} was promoted last"
        return ""
