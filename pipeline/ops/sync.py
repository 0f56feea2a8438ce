"""Telling MLflow, in the foreground, what it missed."""

import logging
import os

from pipeline.config import Params
from pipeline.files import Files
from pipeline.ops.dvc import changes
from pipeline.ops.locks import Busy
from pipeline.ops.tracking import LIMITS, complete_last, tracking_uri

PATIENCE = 45.0
"""Seconds to wait for another process that tells MLflow: it may be waiting for an answer that never comes."""


class TrackingError(RuntimeError):
    """MLflow cannot be reached, or refuses."""


def sync(files: Files, params: Params, again: bool = False) -> tuple[int, int]:
    """Complete the checkout's last execution, and tell what all executions left untold.

    Args:
        files: Of the checkout.
        params: Of the checkout.
        again: Tell everything again.

    Returns:
        How many executions and events there were to tell.

    Raises:
        TrackingError: With the cause; what was told until then is remembered.
        Busy: If another process is telling it.
    """
    for name, value in LIMITS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    from pipeline.ops.delivery import Delivery, cause, sole_delivery  # imports mlflow

    complete_last(files, params, changes())
    try:
        with sole_delivery(files, PATIENCE):
            return Delivery(files, params.tracking.experiment).sync(again=again)
    except Busy:
        raise
    except Exception as error:
        uri = tracking_uri(files)
        raise TrackingError(f"MLflow at {uri} cannot be told ({cause(error)}); everything stays on disk") from error
