"""dvc.yaml says what the sources do: what a stage imports, it depends on; what can be set, some stage tracks."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.records import RECORDS
from pipeline.stage.params_problems import keys
from tests.imports import ROOT, files_of, rooms_of

PIPELINE = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())
STAGES = PIPELINE["stages"]

EDGE = {"cli", "config", "flow", "progress", "registry", "stage", "system", "tracking"}
"""Rooms that change no result: edges to tools, and commands; values are tracked by `params`."""
WITHOUT_RESULT = {
    "retrain.branch",
    "retrain.incoming",
    "retrain.limit_hours",
    "retrain.publish",
    "retrain.refresh",
    "runtime.accelerator",
    "runtime.strategy",
    "runtime.threads",
    "runtime.workers",
    "runtime.teacher_cache_gib",
    "tracking.experiment",
    "tracking.promotion.max_size_ratio",
    "tracking.promotion.margin",
    "tracking.promotion.max_latency_ratio",
    "tracking.model_name",
}
"""Keys that say where and how fast it runs and where it is recorded, not what comes out."""


def reached(stage: str) -> set[str]:
    """Rooms that a stage imports, directly or through other rooms."""
    found: set[str] = set()
    todo = [ROOT / "stages" / f"{stage}.py"]
    while todo:
        for room in rooms_of(todo.pop()) - found - EDGE:
            found.add(room)
            todo += files_of(room)
    return found


def test_the_stages_are_those_that_report() -> None:
    assert list(STAGES) == list(RECORDS)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_all_that_it_imports_and_on_no_other_code(stage: str) -> None:
    code = {dep for dep in STAGES[stage]["deps"] if dep.startswith("pipeline/")}
    rooms = [f"pipeline/{room}" for room in reached(stage)]
    assert code == {room if (ROOT / room).is_dir() else f"{room}.py" for room in rooms}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_itself_and_on_the_versions_of_the_libraries(stage: str) -> None:
    assert {f"stages/{stage}.py", "requirements.lock"} <= set(STAGES[stage]["deps"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_reads_only_what_it_depends_on(stage: str) -> None:
    nodes = list(ast.walk(tree(stage)))
    named = {  # run.files.artifacts("teacher")
        f"artifacts/{node.args[0].value}"
        for node in nodes
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("files.artifacts")
        if isinstance(node.args[0], ast.Constant)
    }
    promised = {  # "Reads   artifacts/prepare/, artifacts/teacher/spec.json"
        "/".join(word.rstrip(",").split("/")[:2])
        for word in (ast.get_docstring(tree(stage)) or "").split()
        if word.startswith("artifacts/")
    }
    assert named | promised <= {*STAGES[stage]["deps"], *STAGES[stage]["outs"]}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_writes_its_artifacts_metrics_and_curves(stage: str) -> None:
    assert STAGES[stage]["outs"] == [f"artifacts/{stage}", *(["artifacts/warnings.csv"] if stage == "prepare" else [])]
    assert STAGES[stage]["metrics"] == [{f"metrics/{stage}.json": {"cache": False}}]
    plots = [name for plot in STAGES[stage].get("plots", []) for name in plot]
    assert plots == ([f"plots/{stage}.csv"] if stage in ("teacher", "student") else [])
    assert STAGES[stage]["cmd"] == f"python -m stages.{stage}"


def test_new_images_make_prepare_run() -> None:
    assert "${data.root}" in STAGES["prepare"]["deps"]


def tree(stage: str) -> ast.Module:
    return ast.parse((ROOT / "stages" / f"{stage}.py").read_text())


def tracked(stage: str, key: str) -> bool:
    """Whether `key`, or a section around it, stands in the stage's params."""
    return any(key == name or key.startswith(f"{name}.") for name in STAGES[stage]["params"])


def leaves() -> list[str]:
    known = list(keys())
    return [key for key in known if not any(other.startswith(f"{key}.") for other in known)]


@pytest.mark.parametrize("key", leaves())
def test_a_key_that_is_set_differently_makes_some_stage_run(key: str) -> None:
    assert any(tracked(stage, key) for stage in STAGES) != (key in WITHOUT_RESULT)


def test_only_keys_that_exist_are_tracked() -> None:
    assert {name for stage in STAGES.values() for name in stage["params"]} <= set(keys())


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_stage_reads_of_params_it_tracks(stage: str) -> None:
    chains = {ast.unparse(node) for node in ast.walk(tree(stage)) if isinstance(node, ast.Attribute)}
    read = {chain.rpartition("params.")[2] for chain in chains if chain.startswith(("params.", "run.params."))}
    exact = read & set(keys())
    assert exact, "the stage reads params under another name; this test must learn it"
    deepest = {key for key in exact if not any(other.startswith(f"{key}.") for other in exact)}
    assert {key for key in deepest if not tracked(stage, key)} <= {"runtime", *WITHOUT_RESULT}


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout whose stages only make their outputs, after `dvc repro`."""
    root = tmp_path_factory.mktemp("graph")
    for name in ("pipeline", "stages", "data", "weights"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("params.yaml", "requirements.lock"):
        shutil.copy(ROOT / name, root)
    (root / "make.py").write_text(
        "import sys\nfrom pathlib import Path\nfor name in sys.argv[1:]:\n"
        "    path = Path(name)\n    path.parent.mkdir(parents=True, exist_ok=True)\n"
        "    path.write_text(name) if path.suffix else path.mkdir(exist_ok=True)\n"
    )
    yaml = YAML()
    pipeline = yaml.load((ROOT / "dvc.yaml").read_text())
    for stage in pipeline["stages"].values():
        outputs = [
            *stage["outs"],
            *(name for part in ("metrics", "plots") for one in stage.get(part, ()) for name in one),
        ]
        stage["cmd"] = " ".join([sys.executable, "make.py", *outputs])
    with (root / "dvc.yaml").open("w") as file:
        yaml.dump(pipeline, file)
    (root / ".dvc").mkdir()
    (root / ".dvc" / "config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], cwd=root, check=True)
    return root


@pytest.mark.parametrize(
    ("file", "stale"),
    [
        ("search/reranking.py", set()),
        ("search/page.py", set()),
        ("registry/policy.py", set()),
        ("stage/run.py", set()),
        ("report/build.py", {"benchmark"}),
        ("compress/paper.py", {"student", "surgery"}),
        ("losses/triplet.py", {"teacher", "student", "surgery"}),
        ("data/sampler.py", set(RECORDS)),
        ("protocols.py", set(RECORDS)),
        ("retrieval/scoring.py", set(RECORDS) - {"prepare"}),
    ],
)
def test_an_edit_makes_those_stages_stale_that_it_concerns(reproduced: Path, file: str, stale: set[str]) -> None:
    path = reproduced / "pipeline" / file
    before = path.read_text()
    path.write_text(before + "\n# edited\n")
    done = subprocess.run([sys.executable, "-m", "dvc", "status", "--json"], cwd=reproduced, capture_output=True)
    path.write_text(before)
    assert set(json.loads(done.stdout)) == stale
