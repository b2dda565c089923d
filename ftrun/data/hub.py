"""Whether the hub can be reached, asked before its client is: the client would retry for minutes."""

from __future__ import annotations

import os
import socket
import threading
from urllib.parse import urlsplit

from ftrun.errors import DataError

WAIT = 3.0  # seconds for the hub's host to answer before it counts as unreachable


def refuse_without_hub(path: str, near: str) -> None:
    """Say at once that the hub is out of reach: its client would retry for minutes."""
    why = ""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        why = "HF_HUB_OFFLINE is set"
    else:
        proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
        target = urlsplit(proxy or os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
        host, port = target.hostname or "huggingface.co", target.port or (443 if target.scheme == "https" else 80)
        if not _answers(host, port):
            why = f"{host} does not answer"
    if why:
        todo = f"Give a local file or folder, or builtin:NAME. {near}"
        raise DataError(
            f'"{path}" is no file or folder here, and the hub is out of reach: {why}', f"data.path={path}", todo
        )


def _answers(host: str, port: int) -> bool:
    """Whether a connection succeeds in time; in a thread, because a dead name server ignores socket time-outs."""
    answered: list[bool] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), WAIT).close()
            answered.append(True)
        except OSError:
            answered.append(False)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(WAIT)
    return answered == [True]
