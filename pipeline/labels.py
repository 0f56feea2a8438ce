"""Labels of identities and cameras: text that is compared character by character, so it is normalised first."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

_INVISIBLE = "\ufeff\u200b\u200c\u200d\u2060"
"""Byte order mark, zero-width characters: Unicode does not count them as white space."""


def clean_label(text: str) -> str:
    """Trim a label and bring it into Unicode normal form NFC: macOS and other systems write `é` differently."""
    while text != (trimmed := text.strip().strip(_INVISIBLE)):
        text = trimmed
    return unicodedata.normalize("NFC", text)


def look_alikes(labels: Iterable[str]) -> list[list[str]]:
    """Return groups of labels that differ only by case, leading zeros or a trailing `.0`; groups and labels sorted."""
    groups: dict[str, set[str]] = defaultdict(set)
    for label in labels:
        without_fraction = re.sub(r"(?<=\d)\.0+$", "", label)
        groups[re.sub(r"(?<!\d)0+(?=\d)", "", without_fraction.casefold())].add(label)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def is_fraction(label: str) -> bool:
    """Return whether a label is a whole number with a trailing `.0`, as pandas writes numbers of incomplete columns."""
    return re.fullmatch(r"-?\d+\.0", label) is not None


def is_missing_value(label: str) -> bool:
    """Return whether a label is what programs write where there is none; all such images would be one identity."""
    return label.casefold() in ("", "nan", "none", "null", "n/a", "na", "<na>", "#n/a", "?")
