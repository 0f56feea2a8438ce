from pathlib import Path

import pytest

from pipeline.flow.deploy import POOL, DeployError, pools

ROOT = Path(__file__).parents[2]


def test_our_own_deployments_share_the_work_pool_that_is_made_for_them() -> None:
    assert pools(ROOT) == [POOL]


def test_pools_are_those_of_the_flow_each_once(tmp_path: Path) -> None:
    text = (ROOT / "prefect.yaml").read_text()
    other = "  - {name: other, entrypoint: 'x.py:else', work_pool: {name: theirs}}\n"
    text = text.replace("name: smaller-student\n    job", "name: mine\n    job")
    (tmp_path / "prefect.yaml").write_text(text + other)
    assert pools(tmp_path) == ["mine"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("deployments: [", "while parsing"),
        ("", "does not describe deployments;"),
        ("name: x", "it lacks 'deployments'"),
        ("deployments: [{name: x}]", "it lacks 'entrypoint'"),
        ("deployments: [{name: x, entrypoint: 'a.py:retrain'}]", "it lacks 'work_pool'"),
        ("deployments: []", "has no deployment of the flow `retrain`"),
    ],
    ids=["missing", "not YAML", "empty", "of another kind", "no entrypoint", "no pool", "none"],
)
def test_a_prefect_yaml_that_cannot_be_used_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "prefect.yaml").write_text(text)
    with pytest.raises(DeployError, match=f"^{tmp_path / 'prefect.yaml'} .*{message}"):
        pools(tmp_path)
