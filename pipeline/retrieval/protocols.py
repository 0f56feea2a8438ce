"""Evaluation protocols by name: mAP is not one number, so none is ever told without the name of its protocol."""

from collections.abc import Callable

from pipeline.retrieval.metrics import Retrieval, evaluate_market

MARKET = "market"
"""The protocol of every split into query and gallery that the pipeline makes."""

PROTOCOLS: dict[str, Callable[..., Retrieval]] = {MARKET: evaluate_market}
"""Each takes query, gallery, query_ids, gallery_ids, query_cameras and gallery_cameras."""
