"""The schedule of prefect.yaml over two years of daylight saving time."""

import os
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import anyio
import pytest
from prefect.client.schemas.schedules import CronSchedule
from prefect.server.schemas.schedules import CronSchedule as ServerSchedule
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
DEPLOYMENTS = YAML(typ="safe", pure=True).load((ROOT / "prefect.yaml").read_text())["deployments"]
WEEKLY = next(one for one in DEPLOYMENTS if one["name"] == "retrain-weekly")["schedules"][0]
BEGIN = datetime(2026, 1, 1)
YEARS = timedelta(days=2 * 365)
ZONES = ("Europe/Berlin", "America/New_York", "Australia/Lord_Howe")
"""Zones of both hemispheres; Lord Howe changes by half an hour."""


def runs(cron: str, zone: str) -> list[datetime]:
    """Times at which a schedule fires, in local time."""
    start = BEGIN.replace(tzinfo=ZoneInfo(zone))

    async def dates() -> list[datetime]:
        schedule = ServerSchedule(cron=cron, timezone=zone)
        return await schedule.get_dates(n=1000, start=start, end=start + YEARS)

    return [date.astimezone(ZoneInfo(zone)) for date in anyio.run(dates)]


@pytest.mark.parametrize("zone", ZONES)
def test_there_is_one_run_each_monday_at_four_local_time(zone: str) -> None:
    CronSchedule(cron=WEEKLY["cron"], timezone=zone)  # the deployment validates it like this
    found = runs(WEEKLY["cron"], zone)
    first = BEGIN + timedelta(days=(7 - BEGIN.weekday()) % 7)
    mondays = [first + timedelta(weeks=week, hours=4) for week in range(104)]
    assert [date.replace(tzinfo=None) for date in found] == mondays
    assert len({date.utcoffset() for date in found}) == 2  # the clocks did change


@pytest.mark.parametrize("zone", ZONES)
def test_there_is_one_run_a_day_even_when_clocks_change(zone: str) -> None:
    found = runs("15 2 * * *", zone)
    days = [date.date() for date in found]
    assert days == [(BEGIN + timedelta(days=day)).date() for day in range(len(days))]
    assert len(days) == YEARS.days


def test_a_worker_that_loads_the_flow_imports_the_real_dvc_and_git(tmp_path: Path) -> None:
    """A folder that Prefect adds to the import path must not hide the libraries."""
    (entrypoint,) = {one["entrypoint"] for one in DEPLOYMENTS}
    words = (
        "import sys; from prefect.flows import load_flow_from_entrypoint as load\n"
        "print(load(sys.argv[1], use_placeholder_flow=False).name); import dvc.config, git.repo"
    )
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", words, entrypoint], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout) == (0, "retrain\n"), done.stderr


def test_the_deployments_run_the_flow_one_at_a_time() -> None:
    limits = {one["name"]: one["concurrency_limit"]["collision_strategy"] for one in DEPLOYMENTS}
    assert limits == {"retrain-weekly": "CANCEL_NEW", "retrain-on-data": "ENQUEUE"}
    assert all(one["concurrency_limit"]["grace_period_seconds"] for one in DEPLOYMENTS)
    assert WEEKLY["timezone"] == "UTC"
