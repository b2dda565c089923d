"""A piece of work that one process does while the others that want it wait: a file that its holder keeps warm."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftrun.runs.state import process_start

BEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0  # without a beat; the holder is taken to be dead
SAID_AFTER = 15.0  # seconds of waiting after which the user hears for whom
LOOK_SECONDS = 0.1


class WorkLock:
    """Held by one process at a time, of any machine that sees ``path``; a holder that died is replaced.

    A holder on this machine is dead when its process is gone, one elsewhere when the file was not touched for
    ``SILENT_SECONDS`` by the clock of the one that waits. Work that two do all the same must end in one rename.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = lambda _: None):
        self.path, self.say = path, say
        self._ended = threading.Event()

    def __enter__(self) -> WorkLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        began, said = time.monotonic(), False
        seen: tuple[Any, float] = (None, began)  # what the file was like, and since when
        while not self._take():
            now, life = time.monotonic(), self._life()
            if life is None:
                continue  # it has just been given back
            if life != seen[0]:
                seen = (life, now)
            if _gone(life[0]) or now - seen[1] > SILENT_SECONDS:
                self._bury(life[0])
            elif not said and now - began > SAID_AFTER:
                self.say(f"waiting for {_holder(life[0])}, which does the same work ({self.path.name})")
                said = True
            time.sleep(LOOK_SECONDS)
        threading.Thread(target=self._beat, name="beat", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if (life := self._life()) and life[0] == self._mine:
            self.path.unlink(missing_ok=True)

    def _take(self) -> bool:
        mine = {"pid": os.getpid(), "host": socket.gethostname(), "started": process_start(os.getpid())}
        self._mine = json.dumps(mine | {"once": uuid.uuid4().hex})
        beside = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}")
        beside.write_text(self._mine)  # whole before anyone can read it
        try:
            os.link(beside, self.path)
            return True
        except FileExistsError:
            return False
        finally:
            beside.unlink()

    def _life(self) -> tuple[str, float] | None:
        try:
            return self.path.read_text(), self.path.stat().st_mtime
        except FileNotFoundError:
            return None

    def _bury(self, dead: str) -> None:
        """Take the file of a dead holder away; another one may have done so, and hold it already: that one keeps it."""
        aside = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(aside)
            if aside.read_text() != dead:
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self.path)
            aside.unlink()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self.path)


def _gone(said: str) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    holder = _read(said)
    if holder.get("host") != socket.gethostname():
        return False
    return process_start(int(holder.get("pid", 0))) != holder.get("started")


def _holder(said: str) -> str:
    holder = _read(said)
    return f"process {holder.get('pid')} on {holder.get('host')}"


def _read(said: str) -> dict[str, Any]:
    try:
        return dict(json.loads(said))
    except (ValueError, TypeError):
        return {}
