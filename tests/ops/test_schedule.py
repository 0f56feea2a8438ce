"""The schedule of prefect.yaml, over two years of clocks that are put forward and back."""

from datetime import datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import anyio
import pytest
from prefect.client.schemas.schedules import CronSchedule
from prefect.server.schemas.schedules import CronSchedule as ServerSchedule
from ruamel.yaml import YAML

DEPLOYMENTS = YAML(typ="safe", pure=True).load((Path(__file__).parents[2] / "prefect.yaml").read_text())["deployments"]
WEEKLY = next(one for one in DEPLOYMENTS if one["name"] == "retrain-weekly")["schedules"][0]
BEGIN = datetime(2026, 1, 1)
YEARS = timedelta(days=2 * 365)
ZONES = ("Europe/Berlin", "America/New_York", "Australia/Lord_Howe")
"""Two that change in opposite directions of the year, one of them by half an hour."""


def runs(cron: str, zone: str) -> list[datetime]:
    """When a schedule fires, in local time."""
    start = BEGIN.replace(tzinfo=ZoneInfo(zone))

    async def dates() -> list[datetime]:
        schedule = ServerSchedule(cron=cron, timezone=zone)
        return await schedule.get_dates(n=1000, start=start, end=start + YEARS)

    return [date.astimezone(ZoneInfo(zone)) for date in anyio.run(dates)]


@pytest.mark.parametrize("zone", ZONES)
def test_there_is_one_run_each_monday_at_four_by_the_local_clock(zone: str) -> None:
    CronSchedule(cron=WEEKLY["cron"], timezone=zone)  # what the deployment makes of it
    found = runs(WEEKLY["cron"], zone)
    first = BEGIN + timedelta(days=(7 - BEGIN.weekday()) % 7)
    mondays = [first + timedelta(weeks=week, hours=4) for week in range(104)]
    assert [date.replace(tzinfo=None) for date in found] == mondays
    assert len({date.utcoffset() for date in found}) == 2  # the clocks did change


@pytest.mark.parametrize("zone", ZONES)
def test_even_in_the_hour_that_is_missing_or_twice_there_is_one_run_a_day(zone: str) -> None:
    found = runs("15 2 * * *", zone)
    days = [date.date() for date in found]
    assert days == [(BEGIN + timedelta(days=day)).date() for day in range(len(days))]
    assert len(days) == YEARS.days


def test_the_deployments_run_the_flow_one_at_a_time() -> None:
    assert {one["entrypoint"] for one in DEPLOYMENTS} == {"pipeline/ops/flow.py:retrain"}
    limits = {one["name"]: one["concurrency_limit"]["collision_strategy"] for one in DEPLOYMENTS}
    assert limits == {"retrain-weekly": "CANCEL_NEW", "retrain-on-data": "ENQUEUE"}
    assert all(one["concurrency_limit"]["grace_period_seconds"] for one in DEPLOYMENTS)
    assert WEEKLY["timezone"] == "UTC"
