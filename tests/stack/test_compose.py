"""docker/compose.yaml as the stack tests read it, and the scripts in docker/."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.stack.compose import services, substitute

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker" / "compose.yaml"
DECLARED = YAML(typ="safe", pure=True).load(COMPOSE.read_text())


def test_variables_are_substituted_as_in_compose() -> None:
    assert substitute("${A:-x}/${B}/$$HOME", {"B": "b"}) == "x/b/$HOME"
    assert substitute("${A:-x}", {"A": ""}) == "x"
    assert substitute("${A:-}", {}) == ""
    with pytest.raises(ValueError, match=r"`\$\{C\}` has no value"):
        substitute("${C}", {})


def test_services_follow_their_dependencies_and_profiles_are_omitted() -> None:
    assert list(services(COMPOSE, {})) == ["postgres", "mlflow", "prefect", "worker", "search"]
    assert services(COMPOSE, {})["worker"].after == ("mlflow", "prefect")


def test_every_service_except_the_worker_has_a_health_check() -> None:
    found = services(COMPOSE, {"SECRETS": "/s/secrets", "MLFLOW_PORT": "77"})
    assert [name for name, service in found.items() if not service.health] == ["worker"]
    assert found["mlflow"].health[-1] == "admin:@/s/secrets/mlflow"
    assert found["worker"].environment["MLFLOW_TRACKING_URI"] == "http://mlflow:77"


SERVICES = "mlflow,prefect,s3,localhost,127.0.0.1,::1"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, SERVICES),
        ({"NO_PROXY": "corp.example", "no_proxy": "corp.example"}, f"corp.example,{SERVICES}"),  # as Docker sets both
        ({"NO_PROXY": "a", "no_proxy": "b"}, f"b,{SERVICES}"),
        ({"NO_PROXY": "a"}, f"a,{SERVICES}"),
        ({"NO_PROXY": "*"}, "*"),
    ],
)
def test_services_reach_each_other_without_the_proxy_that_docker_may_set(given: dict[str, str], expected: str) -> None:
    assert not any("NO_PROXY" in name.upper() for keys in services(COMPOSE, {}).values() for name in keys.environment)
    script = str(ROOT / "docker" / "with-secrets.sh")
    for name, service in services(COMPOSE, {"STACK": str(ROOT / "docker")}).items():
        assert name == "postgres" or service.command[1] == script
    code = "import urllib.request as u; print(u.getproxies()['no'], bool(u.proxy_bypass('mlflow')))"
    environment = {"PATH": os.environ["PATH"], "HTTP_PROXY": "http://proxy:1", **given}
    done = subprocess.run(
        ["sh", script, sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{expected} True\n"


def test_the_worker_has_time_to_save_and_a_fixed_host_name() -> None:
    worker = DECLARED["services"]["worker"]
    assert (worker["stop_grace_period"], worker["hostname"]) == ("60s", "worker")


def test_every_secret_is_generated_and_passed_as_a_file(tmp_path: Path) -> None:
    for _ in range(2):
        subprocess.run(["sh", str(ROOT / "docker" / "make-secrets.sh"), str(tmp_path / "secrets")], check=True)
        made = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
        assert set(made) == set(DECLARED["secrets"])
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "secrets").iterdir())
    assert len(set(made.values())) == len(made)
    subprocess.run(["sh", str(ROOT / "docker" / "make-secrets.sh"), str(tmp_path / "secrets")], check=True)
    assert {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()} == made
    for name, service in DECLARED["services"].items():
        for key, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|AUTH_STRING", key):
                assert key.endswith("_FILE") and value.startswith("${SECRETS:-/run/secrets}/"), f"{name}: {key}"
                assert value.rpartition("/")[2] in service["secrets"], f"{name}: {key}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root creates files for other users")
def test_secrets_created_by_root_belong_to_the_owner_of_the_checkout(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, 12346)
    subprocess.run(["sh", str(ROOT / "docker" / "make-secrets.sh"), str(tmp_path / "secrets")], check=True)
    found = [tmp_path / "secrets", *(tmp_path / "secrets").iterdir()]
    assert {(path.stat().st_uid, path.stat().st_gid) for path in found} == {(12345, 12346)}


def test_a_program_gets_the_content_of_secret_files_in_its_environment(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "one").write_text("it's $HOME\n")
    (tmp_path / "other").write_text("no")
    environment = {
        "PATH": "/usr/bin:/bin",
        "ONE_FILE": str(tmp_path / "secrets/one"),
        "CERT_FILE": str(tmp_path / "other"),
    }
    done = subprocess.run(
        ["sh", str(ROOT / "docker" / "with-secrets.sh"), "sh", "-c", 'echo "$ONE|${CERT-unset}"; exit 3'],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.stdout, done.returncode) == ("it's $HOME|unset\n", 3)
    (tmp_path / "secrets" / "one").unlink()
    assert subprocess.run(["sh", str(ROOT / "docker" / "with-secrets.sh"), "true"], env=environment).returncode


def test_ports_listen_on_this_machine_and_images_are_pinned() -> None:
    for service in DECLARED["services"].values():
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))
        image = service.get("image", "")
        assert image.startswith("smaller-student:") or re.search(r":[\w.-]*\d+\.\d+", image)
    base = re.search(r"ARG PYTHON=(\S+)", (ROOT / "docker" / "Dockerfile").read_text())
    assert base is not None and re.match(r"\d+\.\d+\.\d+-", base[1])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"deploy": {}}, "unsupported keys: deploy"),
        ({"command": "a string"}, "lists of words"),
        ({"healthcheck": {"test": ["CMD-SHELL", "x"]}}, "lists of words"),
        ({"depends_on": {"b": {}}}, "comes before its dependencies b"),
    ],
)
def test_unsupported_compose_features_are_errors(tmp_path: Path, change: dict[str, object], why: str) -> None:
    with (tmp_path / "compose.yaml").open("w") as file:
        YAML().dump({"services": {"a": {"command": ["true"], **change}}}, file)
    with pytest.raises(ValueError, match=why):
        services(tmp_path / "compose.yaml", {})


def test_torch_from_another_index_leaves_the_rest_to_the_lock_file(tmp_path: Path) -> None:
    lock = (ROOT / "requirements.lock").read_text()
    for word, separate in (("", 0), ("torch", 2)):
        (tmp_path / "requirements.lock").write_text(lock)
        subprocess.run(
            ["python3", str(ROOT / "docker" / "split-lock.py"), str(tmp_path / "requirements.lock"), word], check=True
        )
        locked, torch = ((tmp_path / name).read_text() for name in ("locked.txt", "torch.txt"))
        names = re.findall(r"^([\w.-]+)==", locked, re.MULTILINE)
        assert len(re.findall(r"^torch(vision)?==[\d.]+$", torch, re.MULTILINE)) == separate
        assert ("torch" in names, "nvidia-cublas" in names) == (not word, not word)
        assert {"numpy", "mlflow", "prefect", "onnxruntime"} <= set(names)
        assert locked.count("--hash=") > 1000
