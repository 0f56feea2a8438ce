"""Damaged and malicious files are quarantined, in bounded memory."""

import subprocess
import sys

from pipeline.data.inspection import inspect
from pipeline.data.manifest import Item
from tests.data import hostile


def treatments(root, paths):
    inspection = inspect([Item(path, "1", "c1", "train") for path in paths], root)
    unusual = {warning.path for warning in inspection.warnings}
    usable = {item.path: hostile.UNUSUAL if item.path in unusual else hostile.GOOD for item in inspection.good}
    reasons = dict(inspection.quarantined)
    return usable | dict.fromkeys(reasons, hostile.BAD), reasons


def test_each_file_is_treated_as_expected_with_a_reason_of_one_line(tmp_path):
    expected = hostile.write(tmp_path / "root")
    assert len(expected) >= 45
    actual, reasons = treatments(tmp_path / "root", expected)
    assert {path: treatment for path, treatment in actual.items() if treatment != expected[path]} == {}
    assert all(reason and "\n" not in reason and len(reason) < 300 for reason in reasons.values())


PEAK_MEMORY = """
import sys
from pathlib import Path
from tests.data import hostile
from tests.data.test_hostile import treatments
from pipeline.data.inspection import inspect
from pipeline.data.manifest import Item
root = Path(sys.argv[1])
inspect([Item("inside.png", "1", "c1", "train")], root)
def peak_mib():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024
before = peak_mib()
treatments(root, sys.argv[2:])
print(before, peak_mib())
"""


def test_memory_grows_by_less_than_300_mb(tmp_path):
    expected = hostile.write(tmp_path / "root")
    done = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY, str(tmp_path / "root"), *expected],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    before, after = map(float, done.stdout.split())
    assert 100 < after - before < 300  # the largest image that is not refused has 36 million pixels
