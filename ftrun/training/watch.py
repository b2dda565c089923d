"""Finds out which process of a run hangs: each says how far it is, and one that waits too long reads what all said."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ftrun.errors import ComponentError, FtrunError

BEAT_SECONDS = 10.0
SILENT_BEATS = 4  # missed by a process that is stopped or gone


class Watch:
    """Says from a thread how far this process is; calls ``end`` when nothing in the run has moved for ``seconds``."""

    def __init__(self, rank: int, world_size: int, seconds: float, end: Callable[[FtrunError], None]):
        self.rank, self.world_size, self.seconds, self.end = rank, world_size, seconds, end
        self.beat_seconds = min(BEAT_SECONDS, seconds / 10)
        self.moves = self.met = 0  # signs of progress, and collectives entered
        self.where, self.name, self.inside, self.busy = "its start", "", False, False
        self.since = time.monotonic()  # when this process moved last
        self._seen: dict[int, tuple[Any, float]] = {}  # of the others: what they said last, and since when
        self._beats: dict[int, tuple[Any, float]] = {}
        self._closed = threading.Event()
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # a connection of its own: the run's may be waiting for an answer
        self._store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
        threading.Thread(target=self._keep_watch, name="watch", daemon=True).start()

    def moved(self, where: str) -> None:
        """A sign of progress; ``where`` is what a person would call it."""
        self.where, self.moves, self.since = where, self.moves + 1, time.monotonic()

    @contextmanager
    def meeting(self, name: str) -> Iterator[None]:
        """The body is a collective: it ends when all processes have come."""
        self.met, self.moves, self.since, self.inside = self.met + 1, self.moves + 1, time.monotonic(), True
        self.name = name
        try:
            yield
        finally:
            self.inside, self.moves, self.since = False, self.moves + 1, time.monotonic()

    def close(self) -> None:
        self._closed.set()

    def _keep_watch(self) -> None:
        beat = 0
        while not self._closed.wait(self.beat_seconds):
            beat += 1
            if self.busy:
                self.moved(self.where)
            said = {"moves": self.moves, "met": self.met, "where": self.where, "inside": self.inside}
            try:
                self._store.set(
                    f"ftrun/life/{self.rank}", json.dumps(said | {"beat": beat, "host": socket.gethostname()})
                )
                error = self._hung() if time.monotonic() - self.since > 2 * self.beat_seconds else None
            except (RuntimeError, OSError):
                continue  # the store is gone and the run with it; or its process is stopped, and answers no more
            if error is not None and not self._closed.is_set():
                self.end(error)

    def _hung(self) -> FtrunError | None:
        """Who hangs, once nothing has moved anywhere for long enough."""
        now, lives = time.monotonic(), self._lives()
        for rank, life in lives.items():
            for seen, value in ((self._seen, life["moves"]), (self._beats, life["beat"])):
                if seen.get(rank, (None, 0.0))[0] != value:
                    seen[rank] = (value, now)
        if len(lives) < self.world_size or now - self.since < self.seconds:
            return None
        if any(now - self._seen[rank][1] < self.seconds for rank in lives if rank != self.rank):
            return None  # somebody is at work
        late = [rank for rank in lives if now - self._beats[rank][1] > SILENT_BEATS * self.beat_seconds]
        fewest = min(life["met"] for life in lives.values())
        late = late or [rank for rank, life in lives.items() if life["met"] == fewest and not life["inside"]]
        late = late or [rank for rank, life in lives.items() if life["met"] == fewest]
        error = ComponentError(
            "; ".join(self._says(rank, lives[rank]) for rank in late),
            f"launch.timeout={self.seconds / 60:g}",
            "Look at that machine. A stage that takes longer without a sign of progress needs a larger launch.timeout.",
        )
        waiting = [rank for rank in lives if rank not in late] or late
        error.secondary = self.rank != min(waiting)
        return error

    def _lives(self) -> dict[int, dict[str, Any]]:
        keys = {rank: f"ftrun/life/{rank}" for rank in range(self.world_size)}
        return {rank: json.loads(self._store.get(key)) for rank, key in keys.items() if self._store.check([key])}

    def _says(self, rank: int, life: dict[str, Any]) -> str:
        aim = f"{self.name} after {self.where}" if self.inside else self.where
        return (
            f"process {rank} on {life['host']} has not reached {aim} for {self.seconds / 60:g} minutes; "
            f"it was last in {life['where']}"
        )
