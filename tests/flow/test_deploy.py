from pathlib import Path

import pytest

from pipeline.flow.deploy import POOL, DeployError, work_pools

ROOT = Path(__file__).parents[2]


def test_the_deployments_of_the_repository_use_the_default_work_pool() -> None:
    assert work_pools(ROOT) == [POOL]


def test_work_pools_are_those_of_the_flow_without_duplicates(tmp_path: Path) -> None:
    text = (ROOT / "prefect.yaml").read_text()
    other = "  - {name: other, entrypoint: 'x.py:else', work_pool: {name: theirs}}\n"
    text = text.replace("name: smaller-student\n    job", "name: mine\n    job")
    (tmp_path / "prefect.yaml").write_text(text + other)
    assert work_pools(tmp_path) == ["mine"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("deployments: [", "while parsing"),
        ("", "has no valid `deployments`;"),
        ("name: x", "'deployments' is missing"),
        ("deployments: [{name: x}]", "'entrypoint' is missing"),
        ("deployments: [{name: x, entrypoint: 'a.py:retrain'}]", "'work_pool' is missing"),
        ("deployments: []", "has no deployment of the flow `retrain`"),
    ],
    ids=["missing", "not YAML", "empty", "of another kind", "no entrypoint", "no pool", "none"],
)
def test_an_invalid_prefect_yaml_is_an_error_with_its_path(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "prefect.yaml").write_text(text)
    with pytest.raises(DeployError, match=f"^{tmp_path / 'prefect.yaml'} .*{message}"):
        work_pools(tmp_path)
