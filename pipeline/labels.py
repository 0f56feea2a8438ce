"""Labels of identities and cameras: text that is compared character by character, so it is normalised first."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

LOOK_ALIKE = "differ only by case, white space, width, leading zeros or a trailing .0"


def clean_label(text: str) -> str:
    """Trim a label and bring it into Unicode normal form NFC: macOS and other systems write `é` differently.

    White space and invisible characters (category Cf, such as byte order marks) are trimmed.
    """
    start, end = 0, len(text)
    while start < end and _is_blank(text[start]):
        start += 1
    while start < end and _is_blank(text[end - 1]):
        end -= 1
    return unicodedata.normalize("NFC", text[start:end])


def _is_blank(character: str) -> bool:
    return character.isspace() or unicodedata.category(character) == "Cf"


def look_alikes(labels: Iterable[str]) -> list[list[str]]:
    """Return groups of labels that `LOOK_ALIKE`; groups and labels sorted."""
    groups: dict[str, set[str]] = defaultdict(set)
    for label in labels:
        visible = "".join(c for c in unicodedata.normalize("NFKC", label) if unicodedata.category(c) != "Cf")
        plain = " ".join(visible.casefold().lstrip("'").split())  # spreadsheets write ' before a number as text
        groups[re.sub(r"(?<!\d)0+(?=\d)", "", re.sub(r"(?<=\d)\.0+$", "", plain))].add(label)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def is_fraction(label: str) -> bool:
    """Return whether a label is a whole number with a trailing `.0`, as pandas writes numbers of incomplete columns."""
    return re.fullmatch(r"-?\d+\.0", label) is not None


def is_missing_value(label: str) -> bool:
    """Return whether a label is what programs write where there is none; all such images would be one identity."""
    return label.casefold() in ("", "nan", "none", "null", "n/a", "na", "<na>", "#n/a", "?")
