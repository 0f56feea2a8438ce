"""Every kind of file that must not be trusted gets its verdict, in bounded memory."""

import subprocess
import sys

from pipeline.data.inspection import inspect
from pipeline.data.manifest import Item
from tests.data import hostile


def verdicts_of(root, expected):
    found = inspect([Item(path, "1", "c1", "train") for path in expected], root)
    odd = dict(found.warnings)
    verdicts = {item.path: hostile.ODD if item.path in odd else hostile.GOOD for item in found.good}
    return verdicts | {path: hostile.BAD for path, _ in found.quarantined}, dict(found.quarantined)


def test_each_gets_its_verdict_and_a_reason_of_one_line(tmp_path):
    expected = hostile.write(tmp_path / "root")
    assert len(expected) >= 45
    found, reasons = verdicts_of(tmp_path / "root", expected)
    assert {path: verdict for path, verdict in found.items() if verdict != expected[path]} == {}
    assert all(reason and "\n" not in reason and len(reason) < 300 for reason in reasons.values())


MEASURED = """
import sys
from pathlib import Path
from tests.data import hostile
from tests.data.test_hostile import verdicts_of
from pipeline.data.inspection import inspect
from pipeline.data.manifest import Item
expected = {path: "" for path in sys.argv[2:]}
root = Path(sys.argv[1])
inspect([Item("inside.png", "1", "c1", "train")], root)
def most():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024
before = most()
verdicts_of(root, expected)
print(before, most())
"""


def test_memory_grows_by_less_than_300_mb(tmp_path):
    expected = hostile.write(tmp_path / "root")
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path / "root"), *expected],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    before, after = map(float, done.stdout.split())
    assert 100 < after - before < 300  # the largest that is allowed has 36 million pixels
