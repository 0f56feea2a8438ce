"""Make the pictures of this folder anew: three executions in a copy of this checkout, then the pages of each tool.

Needs chromium. The copy shares DVC's cache with the checkout, so what `make demo` has run is not run again.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mlflow import MlflowClient
from PIL import Image
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import Page, expect, sync_playwright
from prefect.client.orchestration import get_client
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
BUDGETS = (0.8, 0.5, 0.65)
"""Reductions of the executions; the last one is the default, whose panels are shown."""
METRICS = ("eval/mAP", "eval/rank1", "model/params_reduction", "model/flops_reduction")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    """Make all pictures."""
    with tempfile.TemporaryDirectory(prefix="pictures-") as folder, ExitStack() as stack:
        copy = Path(folder) / "smaller-student"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(copy)], check=True)
        mlflow, prefect = (f"http://127.0.0.1:{_free_port()}" for _ in range(2))
        os.environ |= {
            "MLFLOW_TRACKING_URI": mlflow,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "PREFECT_API_URL": f"{prefect}/api",
            "PREFECT_HOME": str(Path(folder) / "prefect"),
            "PYTHONPATH": str(copy),
        }
        store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/files"]
        words = ["mlflow", "server", *store, "--workers", "1", "--port", mlflow.rpartition(":")[2]]
        stack.enter_context(_server(words, f"{mlflow}/health", copy))
        port = prefect.rpartition(":")[2]
        stack.enter_context(_server(["prefect", "server", "start", "--port", port], f"{prefect}/api/health", copy))
        _run(copy, "dvc", "cache", "dir", "--local", str(ROOT / ".dvc" / "cache"))
        for reduction in BUDGETS:
            yaml = YAML()
            params = yaml.load(copy / "params.yaml")
            params["student"]["budget"]["reduction"] = reduction
            yaml.dump(params, copy / "params.yaml")
            _run(copy, "pipeline", "retrain", "--force")
        _run(copy, "pipeline", "sync")
        with sync_playwright() as playwright:
            found = next(filter(None, map(shutil.which, BROWSERS)), None)
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": 1700, "height": 900})
            _panels(copy)
            _mlflow(page, mlflow)
            _prefect(page, prefect)
            _search(page, copy)
            browser.close()


def _panels(copy: Path) -> None:
    """Stack two panels of the report, of a good query and of a poor one."""
    panels = [Image.open(path) for path in sorted((copy / "artifacts/benchmark/report").glob("panel-*.png"))[1::4]]
    width, height = 1200, 0
    scaled = [panel.resize((width, round(panel.height * width / panel.width))).convert("RGB") for panel in panels]
    whole = Image.new("RGB", (width, sum(panel.height for panel in scaled)), "white")
    for panel in scaled:
        whole.paste(panel, (0, height))
        height += panel.height
    _save(whole, "panels")


def _mlflow(page: Page, address: str) -> None:
    """Take the table of runs, two budgets as charts, and the versions of the model."""
    client = MlflowClient(address)
    experiment = client.get_experiment_by_name("smaller-student").experiment_id
    runs = client.search_runs([experiment], "tags.stage IS NULL AND params.seed = '0'")
    page.set_viewport_size({"width": 1750, "height": 500})
    _open(page, f"{address}/#/experiments/{experiment}/runs?workflowType=machine_learning")
    row = page.get_by_role("row").filter(has=page.get_by_role("link", name="vehicles, ")).first
    row.get_by_role("button").first.click(timeout=60_000)
    page.get_by_text("Columns", exact=True).click()
    for metric in METRICS:
        page.get_by_placeholder("Search columns").fill(metric)
        page.get_by_text(metric, exact=True).first.click()
    page.keyboard.press("Escape")
    expect(page.get_by_role("link", name="benchmark", exact=True).first).to_be_visible()
    page.wait_for_timeout(3000)
    _shoot(page, "mlflow")
    chosen = "%22,%22".join(run.info.run_id for run in runs[:3])
    page.set_viewport_size({"width": 1500, "height": 620})
    _open(page, f"{address}/#/compare-runs?runs=[%22{chosen}%22]&experiments=[%22{experiment}%22]")
    page.wait_for_timeout(8000)
    _shoot(page, "compare")
    page.set_viewport_size({"width": 1500, "height": 900})
    _open(page, f"{address}/#/models/smaller-student")
    expect(page.get_by_text("Version 1").first).to_be_visible(timeout=60_000)
    page.wait_for_timeout(3000)
    _shoot(page, "registry")


def _open(page: Page, address: str) -> None:
    """Open a page of MLflow and close the panel that it shows beside."""
    page.goto(address)
    with suppress(PlaywrightError):
        page.get_by_role("button", name="Close").click(timeout=15_000)


def _prefect(page: Page, address: str) -> None:
    """Take the last run of the flow, with its tasks and artefacts."""
    with get_client(sync_client=True) as client:
        run = max(client.read_flow_runs(), key=lambda run: run.start_time.timestamp() if run.start_time else 0)
    page.set_viewport_size({"width": 1500, "height": 560})
    page.goto(f"{address}/runs/flow-run/{run.id}")
    page.wait_for_timeout(8000)
    _shoot(page, "prefect")


def _search(page: Page, copy: Path) -> None:
    """Search the default gallery by teacher and student."""
    gallery = copy / "artifacts/prepare/vehicles"
    for name in ("teacher", "model"):
        model = f"artifacts/export/{name}.onnx"
        words = ["--gallery", str(gallery / "image_test"), "--out", f"indexes/{name}", "--model", model]
        _run(copy, "pipeline", "index", *words)
    port = str(_free_port())
    words = ["serve", "--index", "indexes/teacher", "--index", "indexes/model", "--port", port]
    with _server(["pipeline", *words], f"http://127.0.0.1:{port}/indexes", copy):
        page.set_viewport_size({"width": 1280, "height": 760})
        page.goto(f"http://127.0.0.1:{port}")
        page.set_input_files("#file", sorted((gallery / "image_query").glob("*.jpg"))[4])
        expect(page.locator("section")).to_have_count(2)
        page.wait_for_timeout(1000)
        _shoot(page, "search")


def _shoot(page: Page, name: str) -> None:
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        page.screenshot(path=file.name)
        _save(Image.open(file.name).convert("RGB"), name)


def _save(image: Image.Image, name: str) -> None:
    """Save with a palette: a third of the size, and no difference to the eye."""
    image.quantize(256).save(ROOT / "docs" / f"{name}.png", optimize=True)
    print(f"docs/{name}.png")


@contextmanager
def _server(words: Sequence[str], health: str, folder: Path) -> Iterator[None]:
    """Run a server until the block ends, which begins once it answers."""
    with (folder.parent / f"{words[0]}.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", *words], cwd=folder, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 180
            while process.poll() is None and time.monotonic() < deadline:
                with suppress(OSError), urllib.request.urlopen(health, timeout=2):
                    break
                time.sleep(0.5)
            else:
                raise RuntimeError(f"{words[0]} did not start; see {log.name}")
            yield
        finally:
            process.terminate()
            process.wait(30)


def _run(folder: Path, *words: str) -> None:
    subprocess.run([sys.executable, "-m", *words], cwd=folder, check=True)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


if __name__ == "__main__":
    main()
