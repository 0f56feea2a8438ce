"""A server of the user's own: accounts, and an artifact store that fails."""

from pathlib import Path

import pytest
import requests
from mlflow import MlflowClient

from pipeline.files import Files
from tests.fake_stages import Start
from tests.stack.conftest import Serve

pytestmark = pytest.mark.stack

ACCOUNTS = """[mlflow]
default_permission = READ
database_uri = sqlite:///{folder}/accounts.db
admin_username = admin
admin_password = {password}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""
PASSWORD = "a long password"
NAMES = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"


def run(start: Start, files: Files, *words: str, **environment: str) -> tuple[int, str]:
    process = start(files, "-m", *words, PREFECT_HOME=str(files.root / "prefect"), **environment)
    out, err = process.communicate(timeout=300)
    return process.returncode, out + err


def test_each_command_names_the_variables_of_the_login(
    pipeline: Files, start: Start, serve: Serve, tmp_path: Path
) -> None:
    accounts = tmp_path / "accounts.ini"
    accounts.write_text(ACCOUNTS.format(folder=tmp_path, password=PASSWORD))
    environment = {"MLFLOW_AUTH_CONFIG_PATH": str(accounts), "MLFLOW_FLASK_SERVER_SECRET_KEY": "key"}
    address = serve(f"sqlite:///{tmp_path / 'server.db'}", "--app-name", "basic-auth", **environment)
    server = {"MLFLOW_TRACKING_URI": address, "HOME": str(tmp_path)}  # MLflow reads credentials from there, too
    code, text = run(start, pipeline, "stages.prepare", NAP="10", **server)
    problem = f"it needs a login (401); set {NAMES}, or MLFLOW_TRACKING_TOKEN"
    assert code == 0 and f"the upload to MLflow at {address} is not complete: {problem}; `smaller-student sync`" in text
    for words in (["sync"], ["history"], ["pull"], ["rollback"], ["compare", "--last", "1"]):
        code, text = run(start, pipeline, "pipeline", *words, **server)
        assert code == 1
        assert text.startswith(f"smaller-student: MLflow at {address} needs a login (401); set {NAMES}, or MLFLOW_TR")
        assert text.count("\n") == 1
    login = {**server, "MLFLOW_TRACKING_USERNAME": "admin"}
    code, text = run(start, pipeline, "pipeline", "sync", MLFLOW_TRACKING_PASSWORD="wrong", **login)
    assert code == 1 and f"rejects the password of user admin (401); correct {NAMES}" in text
    code, text = run(start, pipeline, "pipeline", "sync", MLFLOW_TRACKING_PASSWORD=PASSWORD, **login)
    assert (code, text) == (0, "executions uploaded: 1\n")


def test_an_experiment_that_is_denied_to_the_user_does_not_stop_the_others(
    pipeline: Files, start: Start, serve: Serve, tmp_path: Path
) -> None:
    accounts = tmp_path / "accounts.ini"
    accounts.write_text(ACCOUNTS.format(folder=tmp_path, password=PASSWORD).replace("READ", "NO_PERMISSIONS"))
    environment = {"MLFLOW_AUTH_CONFIG_PATH": str(accounts), "MLFLOW_FLASK_SERVER_SECRET_KEY": "key"}
    address = serve(f"sqlite:///{tmp_path / 'server.db'}", "--app-name", "basic-auth", **environment)
    admin, ann = ("admin", PASSWORD), ("ann", "another password")
    user = dict(zip(("username", "password"), ann, strict=True))
    requests.post(f"{address}/api/2.0/mlflow/users/create", json=user, auth=admin, timeout=30).raise_for_status()
    experiments = f"{address}/api/2.0/mlflow/experiments"
    denied = {"name": "of somebody else"}
    requests.post(f"{experiments}/create", json=denied, auth=admin, timeout=30).raise_for_status()
    text = pipeline.params.read_text()
    for experiment in ("of somebody else", "of ann"):  # the denied one first
        pipeline.params.write_text(text.replace("experiment: smaller-student", f"experiment: {experiment}"))
        assert run(start, pipeline, "stages.prepare", MLFLOW_TRACKING_URI="http://127.0.0.1:9")[0] == 0
    login = {"MLFLOW_TRACKING_URI": address, "MLFLOW_TRACKING_USERNAME": ann[0], "MLFLOW_TRACKING_PASSWORD": ann[1]}
    notice = "experiment of somebody else: MLflow denies the request to user ann (403); ask its administrator, or set "
    for uploaded in ("executions uploaded: 1\n", ""):
        code, text = run(start, pipeline, "pipeline", "sync", **login)
        assert (code, text) == (0, f"{notice}another {NAMES}\n{uploaded}")
    found = requests.get(f"{experiments}/get-by-name?experiment_name=of ann", auth=ann, timeout=30).json()
    number = [found["experiment"]["experiment_id"]]
    runs = requests.post(
        f"{address}/api/2.0/mlflow/runs/search", json={"experiment_ids": number}, auth=ann, timeout=30
    ).json()["runs"]
    assert [one["info"]["status"] for one in runs] == ["FINISHED"] * 2


def test_files_arrive_when_the_artifact_store_of_the_server_works_again(
    pipeline: Files, start: Start, serve: Serve, tmp_path: Path
) -> None:
    folder = tmp_path / "artifacts of the server"
    folder.write_text("")  # a file where the server needs a folder: each of its answers about artifacts is a 500
    address = serve(f"sqlite:///{tmp_path / 'server.db'}", "--artifacts-destination", str(folder))
    client = MlflowClient(address)

    def statuses() -> list[str]:
        experiment = client.get_experiment_by_name("smaller-student").experiment_id
        return [found.info.status for found in client.search_runs([experiment])]

    code, text = run(start, pipeline, "stages.export", MLFLOW_TRACKING_URI=address)
    assert code == 0, text
    sentence = f"MLflow at {address} has all figures and statuses, but its artifact store failed: "
    for _ in range(2):
        code, text = run(start, pipeline, "pipeline", "sync", MLFLOW_TRACKING_URI=address)
        assert (code, text.count("\n")) == (1, 1)
        assert text.startswith(f"smaller-student: {sentence}") and "; the files stay on disk, and `smaller" in text
        assert statuses() == ["FINISHED"] * 2
    folder.unlink()
    code, text = run(start, pipeline, "pipeline", "sync", MLFLOW_TRACKING_URI=address)
    assert (code, text) == (0, "executions uploaded: 1\n")
    assert statuses() == ["FINISHED"] * 2
    experiment = client.get_experiment_by_name("smaller-student").experiment_id
    (found,) = client.search_runs([experiment], "tags.stage = 'export'")
    assert [file.path for file in client.list_artifacts(found.info.run_id)] == ["export"]
