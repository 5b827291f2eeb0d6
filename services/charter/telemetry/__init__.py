"""Structured logs with a request id, and metrics with bounded labels."""

from __future__ import annotations

from charter.telemetry.logs import Logger, bind_request_id, configure, get_logger, request_id
from charter.telemetry.metrics import MetricsServer, serve_metrics

__all__ = [
    "Logger",
    "MetricsServer",
    "bind_request_id",
    "configure",
    "get_logger",
    "request_id",
    "serve_metrics",
]
