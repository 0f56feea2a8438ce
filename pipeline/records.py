"""What a stage reports: frozen records that become metrics/<stage>.json and come back from it.

Numbers only. Rates are fractions in [0, 1]; `macs` are multiply-accumulates for one image at the run's size; `params`
and `macs` count backbone and embedding head, never the classifier.
"""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Base of all records."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def flat(self) -> dict[str, float]:
        """The numbers under dotted names, nested ones joined with a dot."""
        return dict(_flatten("", self.model_dump(exclude_none=True)))


def _flatten(prefix: str, numbers: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in numbers.items():
        if isinstance(value, dict):
            yield from _flatten(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", float(value)


class Scores(Record):
    """Retrieval quality under the protocol of the run; `recall` by k where the protocol quotes that."""

    map: float
    rank1: float
    rank5: float
    rank10: float
    minp: float
    queries: int
    dropped: int
    recall: dict[str, float] | None = None
    map_deviation: float | None = None


class PrepareRecord(Record):
    """Stage `prepare`: counts of images, except identities and cameras."""

    images: int
    identities: int
    cameras: int
    train: int
    validation: int
    query: int
    gallery: int
    quarantined: int
    leaked: int
    near_duplicates: int


class TeacherRecord(Scores):
    """Stage `teacher`."""

    params: int
    macs: int


class StudentRecord(TeacherRecord):
    """Stage `student`: params and macs as after folding and cutting; latency, estimated, where the budget is of it."""

    params_reduction: float
    macs_reduction: float
    latency_reduction: float | None = None
    target: float


class SurgeryRecord(TeacherRecord):
    """Stage `surgery`; `max_abs_diff` compares embeddings in float64 before and after."""

    params_reduction: float
    macs_reduction: float
    max_abs_diff: float
    widths: dict[str, int]


class ExportRecord(Record):
    """Stage `export`: mAP and bytes of model.onnx and of the other files; smallest cosine with torch, of floats.

    `map_student_on_teacher` is that of the student's queries in a gallery that the teacher has embedded.
    """

    map: float
    map_allinone: float
    map_int8: float | None = None
    map_teacher: float
    map_student_on_teacher: float | None = None
    min_cosine: float
    bytes: int
    bytes_allinone: int
    bytes_int8: int | None = None
    bytes_teacher: int
    params: int
    macs: int
    params_reduction: float
    macs_reduction: float
    int8_published: int


class Latency(Record):
    """One file at one setting, milliseconds a call."""

    p50: float
    p90: float
    p99: float


class BenchmarkRecord(Record):
    """Stage `benchmark`: `speedup` is the ratio of p50 at batch 1 with all threads; `realised` its share of the ideal.

    `teacher`, `student` and `int8` hold latencies by setting, named `batch<B>_threads<T>` (T = `all` or a number).
    `conclusive` is 1 where the 95 % interval from `speedup_low` to `speedup_high` is narrow. Memory is the peak of
    loading a file and one call of the largest batch, bytes.
    """

    speedup: float
    speedup_low: float
    speedup_high: float
    conclusive: int
    speedup_by_setting: dict[str, float]
    ideal_speedup: float
    realised: float
    teacher: dict[str, Latency]
    student: dict[str, Latency]
    int8: dict[str, Latency] | None = None
    speedup_int8: float | None = None
    memory_teacher: int | None = None
    memory_student: int | None = None


RECORDS: dict[str, type[Record]] = {
    "prepare": PrepareRecord,
    "teacher": TeacherRecord,
    "student": StudentRecord,
    "surgery": SurgeryRecord,
    "export": ExportRecord,
    "benchmark": BenchmarkRecord,
}
"""The stages, in the order in which they run, and what each reports."""
