"""Order of promotions of a registered model, derived from its versions, and detection of manual changes in MLflow.

MLflow creates a version together with its tags in one transaction and numbers it. The tags record whether the version
passed the promotion rule and which promotion it follows (`gate`, `replaces`), so every process derives the same order.
A version that passed but does not follow the last promotion does not count: another promotion came first, and the
version is compared again. A rollback is a version too (`restores`), like the commit that `git revert` makes.

Aliases, and tags that are written later, cannot give that order, because MLflow overwrites both unconditionally. For
example, versions 2 and 3 pass against 1, 2 becomes champion, then the promoter of 3 moves the alias and is killed
before it reads again: 3 would stay champion although it fails against 2. The alias is therefore only a copy of what the
versions record: it may lag behind by one command, but never points at a version that failed.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from mlflow.entities.model_registry import ModelVersion, RegisteredModel

CHAMPION, CHALLENGER, BEST = "champion", "challenger", "best"
"""Aliases; BEST is also a tag of a version: the version with the best mAP so far, or ITSELF."""
DECISION, PASSED, FAILED, REASON, REPLACES, RESTORES = "gate", "passed", "failed", "reason", "replaces", "restores"
"""Tags of a version, and the two values of DECISION."""
NONE, ITSELF = "none", "itself"
PROMOTED, SHOWN = "promoted", "shown"
"""Tags of the registered model (version of the last promotion) and of a version (its aliases were set)."""


@dataclass(frozen=True)
class Promotion:
    """A change of the champion.

    Attributes:
        number: Version that records the change.
        version: New champion: `number`, or an earlier version after a rollback.
        best: Version with the best mAP up to this promotion.
        action: `promote` or `rollback`.
        when: Time in UTC.
    """

    number: str
    version: str
    best: str
    action: str
    reason: str
    when: datetime

    @classmethod
    def from_version(cls, recorded: ModelVersion) -> "Promotion":
        """Read a promotion from the tags of the version that records it."""
        number, tags = str(recorded.version), recorded.tags
        version, best = tags.get(RESTORES, number), tags.get(BEST, ITSELF)
        action = "rollback" if RESTORES in tags else "promote"
        when = datetime.fromtimestamp(recorded.creation_timestamp / 1000, UTC)
        return cls(number, version, version if best == ITSELF else best, action, tags.get(REASON, ""), when)


@dataclass
class Lineage:
    """Promotions recorded by the versions of a model.

    Attributes:
        versions: All versions that are not deleted, by number.
        promotions: Valid promotions, the oldest first.
        champions: Promotions that a rollback can return to; the last one is the present champion.
        withdrawn: Versions that a rollback withdrew.
        model_tags: Tags of the registered model, if they were read.
        gap: Description of a deletion that makes the order of promotions unknown; empty if there is none.
    """

    versions: dict[str, ModelVersion]
    promotions: list[Promotion] = field(default_factory=list)
    champions: list[Promotion] = field(default_factory=list)
    withdrawn: set[str] = field(default_factory=set)
    model_tags: dict[str, str] = field(default_factory=dict)
    gap: str = ""

    @classmethod
    def from_versions(cls, versions: Iterable[ModelVersion]) -> "Lineage":
        """Derive the lineage from all versions in ascending order."""
        lineage = cls({str(version.version): version for version in versions})
        for number, version in lineage.versions.items():
            replaced = version.tags.get(REPLACES, NONE)
            if version.tags.get(DECISION) != PASSED or not version.tags.keys() & {REPLACES, RESTORES}:
                continue
            if RESTORES in version.tags or (replaced == lineage.last and not lineage.gap):
                lineage._add(Promotion.from_version(version))
            elif replaced != NONE and replaced not in lineage.versions:
                lineage.gap = f"version {replaced}, which version {number} replaced, was deleted in MLflow"
        return lineage

    def _add(self, promotion: Promotion) -> None:
        if promotion.action == "rollback":  # withdraws the champions after the restored version, or only the last one
            names = [champion.version for champion in self.champions]
            others = len(names) if self.gap else len(names) - 1
            kept = names.index(promotion.version) if promotion.version in names else others
            self.withdrawn = self.withdrawn.union(names[kept:]) - {promotion.version}
            self.champions = self.champions[:kept]
            self.gap = ""
        self.promotions.append(promotion)
        self.champions.append(promotion)

    @property
    def last(self) -> str:
        """Version that records the last promotion, or NONE."""
        return self.promotions[-1].number if self.promotions else NONE

    @property
    def champion(self) -> Promotion | None:
        return self.champions[-1] if self.champions else None

    @property
    def passed(self) -> list[str]:
        """Versions that passed the promotion rule, to which a rollback may go."""
        return [
            number
            for number, version in self.versions.items()
            if version.tags.get(DECISION) == PASSED and RESTORES not in version.tags
        ]

    def manual_change(self, model: RegisteredModel) -> str:
        """Describe what was deleted or moved by hand in MLflow; empty if nothing was.

        Args:
            model: The registered model, read before the versions, so that a promotion in between is not reported.
        """
        alias, shown, champion = model.aliases.get(CHAMPION), model.tags.get(PROMOTED), self.champion
        if self.gap:
            return self.gap
        if shown is not None and shown not in [promotion.number for promotion in self.promotions]:
            return f"version {shown}, the last one that was promoted, was deleted in MLflow, or its tags were"
        if champion is None:
            return f"alias `{CHAMPION}` is at version {alias}, whose promotion is not recorded" if alias else ""
        if missing := {champion.version, champion.best} - self.versions.keys():
            return f"version {min(missing)}, the champion or the best one so far, was deleted in MLflow"
        # A promoter that is slow, or was killed before it set the tag SHOWN, may have set the alias last.
        late = {promotion.version for promotion in self.promotions if SHOWN not in self.versions[promotion.number].tags}
        if shown == champion.number and str(alias) not in late | {champion.version}:
            change = f"moved to version {alias}" if alias else "deleted"
            return f"alias `{CHAMPION}` was {change} in MLflow, but version {champion.version} was promoted last"
        return ""
