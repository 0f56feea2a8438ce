"""Fake stages of test checkouts, and the metrics that they return."""

import json
import subprocess
import time
from collections.abc import Callable

NUMBERS = {
    "prepare": {"images": 9, "identities": 3, "cameras": 2, "train": 4, "validation": 0, "query": 2, "gallery": 3},
    "teacher": {"params": 1_000_000, "macs": 20_000_000},
    "student": {"params": 500_000, "macs": 9_000_000, "params_reduction": 0.5, "macs_reduction": 0.55, "target": 0.55},
    "surgery": {
        "params": 500_000,
        "macs": 9_000_000,
        "params_reduction": 0.5,
        "macs_reduction": 0.55,
        "max_abs_diff": 1e-14,
    },
    "export": {"map": 0.59, "map_allinone": 0.59, "map_teacher": 0.61, "min_cosine": 0.999999, "bytes": 2000},
    "benchmark": {"speedup": 2.0, "ideal_speedup": 2.5, "realised": 0.8},
}
SCORES = {"map": 0.6, "rank1": 0.7, "rank5": 0.8, "rank10": 0.9, "minp": 0.3, "queries": 2, "dropped": 0}
LATENCIES = {
    "speedup_by_setting": {"batch1_threadsall": 2.0},
    "speedup_low": 1.9,
    "speedup_high": 2.1,
    "conclusive": 1,
    "teacher": {"batch1_threadsall": {"p50": 4.0, "p90": 5.0, "p99": 6.0}},
    "student": {"batch1_threadsall": {"p50": 2.0, "p90": 3.0, "p99": 4.0}},
}
NUMBERS["prepare"] |= {"quarantined": 0, "leaked": 0, "near_duplicates": 0}
for _stage in ("teacher", "student", "surgery"):
    NUMBERS[_stage] |= SCORES | ({"map": 0.61} if _stage == "teacher" else {})
NUMBERS["surgery"] |= {"widths": {"layer1.0.conv1": 8}}
NUMBERS["export"] |= {
    "params": 500_000,
    "macs": 9_000_000,
    "params_reduction": 0.5,
    "macs_reduction": 0.55,
    "int8_published": 0,
    "bytes_allinone": 2100,
    "bytes_teacher": 4000,
}
NUMBERS["benchmark"] |= LATENCIES

STAGE = """
import json, logging, os, sys, time
from pipeline.files import write_text
from pipeline.stage.run import Run, run_stage
from pipeline.records import RECORDS

class CheckError(RuntimeError):
    exit_code = 4

def {stage}(run: Run):
    print("running")
    for epoch in (1, 2):
        if run.stage in ("teacher", "student"):
            run.curve({{"epoch": epoch, "loss": 1 / epoch}} | ({{"validation_map": 0.5}} if epoch == 2 else {{}}))
    logging.getLogger("pipeline.{stage}").info("naps")
    time.sleep(float(os.environ.get("NAP", "0")))
    if os.environ.get("FAIL") == run.stage:
        raise CheckError("the parity is gone; train again")
    write_text(run.out / "result.txt", str(run.params.seed))
    if run.stage == "benchmark":
        write_text(run.files.report / "index.html", "<h1>report</h1>")
    return RECORDS[run.stage].model_validate(json.loads({numbers!r}))

if __name__ == "__main__":
    run_stage({stage})
"""


def source(stage: str) -> str:
    """Return the content of stages/<stage>.py."""
    return STAGE.format(stage=stage, numbers=json.dumps(NUMBERS[stage]))


Start = Callable[..., "subprocess.Popen[str]"]
"""Starts Python in a checkout: `start(files, *words, **environment)`."""
OFF = {"SMALLER_STUDENT_TRACKING": "off"}


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until a condition holds that another process fulfils."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
