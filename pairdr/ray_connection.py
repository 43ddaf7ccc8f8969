"""The connection of this process to a Ray cluster."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

from pairdr.backends.exported import count_cores
from pairdr.errors import MissingExtraError, UsageError

_LOCAL = "local"


def load_ray() -> Any:
    """Return the module `ray`.

    Raises:
        MissingExtraError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # of two ways that of later releases
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("ray", "ray") from error
    return ray


def connect_ray(address: str | None) -> bool:
    """Connect this process to a Ray cluster where it is not; return whether that was needed.

    Args:
        address: host:port, or auto; None is RAY_ADDRESS, or Ray on this machine alone.

    Raises:
        MissingExtraError: Ray is not installed.
        UsageError: no cluster answers at the address, or it is one of Ray's client.
    """
    ray = load_ray()
    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS") or _LOCAL
    if address.startswith("ray://"):
        raise UsageError(
            "Ray's client cannot reach the files of this machine.",
            path=address,
            remedy="Start pairdr on a node of the cluster and name host:port, or 'auto'.",
        )
    alone = {"num_cpus": count_cores(), "include_dashboard": False}
    try:
        _require_listener(address)
        ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL, **(alone if address == _LOCAL else {}))
    except (ConnectionError, OSError, OverflowError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"No Ray cluster answers: {first_line(error)}.",
            path=address,
            remedy="Check --ray-address and RAY_ADDRESS, and that `ray start` of the same version has run there.",
        ) from error
    return True


def first_line(error: BaseException) -> str:
    """Return what an error says, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _require_listener(address: str) -> None:
    """Refuse host:port where nobody listens: Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()
