"""Metrics of each stage: the content of metrics/<stage>.json.

All values are numbers. Rates are fractions in [0, 1]; `macs` are multiply-accumulates for one image of size
`data.image_size`; `params` and `macs` count backbone and embedding head, not the classifier.
"""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Base of all records."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def flat(self) -> dict[str, float]:
        """Return all numbers; names of nested ones are joined with dots."""
        return dict(_flatten("", self.model_dump(exclude_none=True)))


def _flatten(prefix: str, numbers: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in numbers.items():
        if isinstance(value, dict):
            yield from _flatten(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", float(value)


class Scores(Record):
    """Retrieval quality under the protocol of the run.

    Attributes:
        map: Mean average precision.
        minp: Mean inverse negative penalty (Ye et al., 2021).
        queries: All queries, including the dropped ones.
        dropped: Queries without a match in the gallery, which no average counts.
        recall: Recall at k by k, for protocols that report it.
        map_deviation: Standard deviation of mAP over the repetitions of a protocol that draws its galleries at random.
    """

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
    """Metrics of stage `prepare`; counts are numbers of images, unless they are of identities or cameras.

    `images` counts those with labels, `unlabelled` the others, and `unlabelled_removed` those left out because they are
    in the test or validation set, look like an image there, or overlap one in its file. `seen_identities` counts those
    of `test_identities` that are in training too; 0 unless `data.closed_set` is true.
    """

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
    test_identities: int = 0
    seen_identities: int = 0
    unlabelled: int = 0
    unlabelled_removed: int = 0


class TeacherRecord(Scores):
    """Metrics of stage `teacher`; `macs` is missing for an ONNX file whose operators cannot be counted."""

    params: int
    macs: int | None = None


class StudentRecord(Scores):
    """Metrics of stage `student`; `params` and `macs` are those after folding and surgery.

    `latency_reduction` is estimated, and present only if `student.budget.of` is latency.
    """

    params: int
    macs: int
    params_reduction: float
    macs_reduction: float
    latency_reduction: float | None = None
    target: float


class SurgeryRecord(Scores):
    """Metrics of stage `surgery`; `max_abs_diff` compares float64 embeddings before and after it."""

    params: int
    macs: int
    params_reduction: float
    macs_reduction: float
    max_abs_diff: float
    widths: dict[str, int]


class ExportRecord(Record):
    """Metrics of stage `export`; `map` and `bytes` are those of model.onnx.

    `min_cosine` is the smallest cosine similarity between the embeddings of a float file and those of torch;
    `map_student_on_teacher` searches a gallery embedded by the teacher with queries embedded by the student. Reductions
    are relative to the uncompressed student, as in the other stages, and those `_to_teacher` to the teacher, which may
    be another network; that of MACs is missing if the teacher's cannot be counted.
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
    params_reduction_to_teacher: float | None = None
    macs_reduction_to_teacher: float | None = None
    int8_published: int


class Latency(Record):
    """Percentiles of the latency of one ONNX file at one setting, in milliseconds per call."""

    p50: float
    p90: float
    p99: float


class BenchmarkRecord(Record):
    """Metrics of stage `benchmark`.

    `speedup` is the ratio of p50 latencies at the smallest batch with all threads, `ideal_speedup` the ratio of MACs,
    and `realised` the quotient of the two. `conclusive` is 1 if the 95 % interval [`speedup_low`, `speedup_high`] is
    narrow. `teacher`, `student` and `int8` hold latencies by setting `batch<B>_threads<T>` (T is `all` or a number, and
    `threads` is the number that `all` stands for); so does `uncompressed`, the network that the student was before it
    shrank, if that is not the teacher.
    Memory is the peak in bytes of loading a file and running the largest batch once.
    """

    speedup: float
    speedup_low: float
    speedup_high: float
    conclusive: int
    speedup_by_setting: dict[str, float]
    ideal_speedup: float | None = None
    realised: float | None = None
    threads: int | None = None
    teacher: dict[str, Latency]
    student: dict[str, Latency]
    int8: dict[str, Latency] | None = None
    uncompressed: dict[str, Latency] | None = None
    speedup_int8: float | None = None
    speedup_over_uncompressed: float | None = None
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
"""Stages in the order in which they run, and the class of their metrics."""
