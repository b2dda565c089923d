"""Torch's elastic agent with the manners of ftrun: signals, one error, time to save, and no worker left behind."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError

from ftrun.config.grammar import quote
from ftrun.config.settings import LaunchConfig
from ftrun.errors import ComponentError, ConfigError, FtrunError
from ftrun.runs.artifacts import digest
from ftrun.training import launch as processes
from ftrun.training.launch import Worker
from ftrun.training.meeting import Meeting, interface_of
from ftrun.training.signals import error_for, stop_of

STOPPED = (130, 143, -signal.SIGINT, -signal.SIGTERM, -signal.SIGUSR1)
FINAL = (2, 3, 4, 130, 143)  # exit codes after which the same command would only fail again, or was told to end
ENDED = "ftrun/ended"  # where a machine says that the run is over, and why
HEARD_SECONDS = 5.0  # in which the machine that ended a run has said so


class Agent(SimpleElasticAgent):
    """Starts the workers of this machine, watches them, and starts them again after a loss."""

    def __init__(self, command: Sequence[str], launch: LaunchConfig, out: str | None, folder: Path):
        self.meeting = Meeting(launch)
        spec = WorkerSpec(
            role="ftrun",
            local_world_size=launch.processes,
            rdzv_handler=self.meeting,
            entrypoint=sys.executable,
            max_restarts=launch.restarts,
            monitor_interval=0.05,
        )
        super().__init__(spec, exit_barrier_timeout=launch.timeout * 60)
        self.command, self.launch, self.out, self.folder = list(command), launch, out, folder
        self.started: list[Worker] = []
        self.failed: list[Worker] = []  # by themselves, the first one first
        self.since = 0.0  # when the first one was seen to have failed
        self.attempt = 0  # how often the group was formed before; the same on all machines
        self.told: int | None = None  # the signal that was passed on
        self.cause: FtrunError | None = None  # said by another machine
        self._server: TCPStore | None = None  # where the workers meet; it outlives each of them

    def carry_out(self) -> str | None:
        """Run to the end and return the run's folder. Raises the error of the process that failed first."""
        log = logging.getLogger("torch.distributed.elastic")
        level = log.level
        log.setLevel(
            logging.INFO if os.environ.get("FTRUN_DEBUG") else logging.CRITICAL
        )  # what went wrong is ours to say
        try:
            result: Any = self.run()
        finally:
            log.setLevel(level)
            self.meeting.shutdown()
        if result is None or result.is_failed():
            raise self._error()
        return self.out

    def take_signal(self, number: int) -> None:
        """Pass a signal on; with no worker to take it, end the waiting. Raises Interrupted, Preempted."""
        self.told, self._remaining_restarts = number, 0
        alive = [worker for worker in self.started if worker.code is None]
        for worker in alive:
            worker.process.send_signal(number)
        if not alive and not self._in_exit_barrier:
            raise error_for(stop_of(number))

    # ---- what torch's agent asks for ----

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        super()._rendezvous(worker_group)  # type: ignore[call-arg]  # a decorator hides its parameters
        store: Any = worker_group.store
        rank, nodes = int(worker_group.group_rank or 0), int(worker_group.group_world_size or 1)
        mine = {"attempt": self.attempt, "command": digest(self.command), "out": self.out, "host": self.meeting.address}
        if rank == 0:  # a store of its own for every group: nothing is left in it from one that was lost
            self._server = TCPStore(self.meeting.address, 0, is_master=True, wait_for_workers=False)
            mine["port"] = self._server.port
        store.set(f"ftrun/node/{rank}", json.dumps(mine))
        everyone: list[dict[str, Any]] = [json.loads(store.get(f"ftrun/node/{one}")) for one in range(nodes)]
        for other in everyone:
            if other["command"] != everyone[0]["command"]:
                raise ConfigError(
                    f"machine {other['host']} was given another command than {everyone[0]['host']}",
                    f"launch.rendezvous={self.launch.rendezvous}",
                    "Give all machines the same command, or another run another port.",
                )
        self.attempt = max(other["attempt"] for other in everyone)
        self.out = everyone[0]["out"]
        worker_group.master_addr, worker_group.master_port = everyone[0]["host"], everyone[0]["port"]

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self.failed, self.since, self.started = [], 0.0, []
        pinned = [*self.command, f"out={quote(self.out)}"] if self.out else self.command
        for worker in worker_group.workers:
            environment = {
                "RANK": str(worker.global_rank),
                "LOCAL_RANK": str(worker.local_rank),
                "WORLD_SIZE": str(worker.world_size),
                "LOCAL_WORLD_SIZE": str(self.launch.processes),
                "GROUP_RANK": str(worker_group.group_rank),
                "MASTER_ADDR": str(worker_group.master_addr),
                "MASTER_PORT": str(worker_group.master_port),
                "TORCHELASTIC_RESTART_COUNT": str(self.attempt),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            if self.launch.nodes > 1 and "GLOO_SOCKET_IFNAME" not in os.environ:
                # the name of a machine often stands for an address that only itself can reach
                environment["GLOO_SOCKET_IFNAME"] = interface_of(self.meeting.address)
            file = self.folder / f"{self.attempt}-{worker.global_rank}.json"
            self.started.append(processes.start(worker.global_rank, pinned, environment, file))
        self.attempt += 1
        if self.told is not None:
            self._signal_all(self.told)
        return {local: worker.process.pid for local, worker in enumerate(self.started)}

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._note_failed()
        running = any(worker.code is None for worker in self.started)
        if self.failed:
            if not self.since:
                self.since = time.monotonic()
                self._say_why(worker_group.store)
            stopped = self.failed[0].code in STOPPED
            patience = processes.GRACE_SECONDS if stopped else processes.LOST_SECONDS
            if running and time.monotonic() - self.since <= patience:
                return RunResult(state=WorkerState.HEALTHY)
            self._note_failed()
            return self._failure(worker_group.store)
        if running:
            return RunResult(state=WorkerState.HEALTHY)
        return RunResult(state=WorkerState.SUCCEEDED, return_values={worker.rank: None for worker in self.started})

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        """Before the group forms anew: those that are still at work may finish what they are writing."""
        if not self.failed:
            self._signal_all(signal.SIGTERM)
            deadline = time.monotonic() + processes.LOST_SECONDS
            while any(worker.code is None for worker in self.started) and time.monotonic() < deadline:
                time.sleep(0.05)
        self._shutdown()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGKILL, timeout: int = 30) -> None:
        self._signal_all(signal.SIGKILL)
        for worker in self.started:
            worker.process.wait()

    # ---- failures ----

    def _note_failed(self) -> None:
        self.failed += [worker for worker in self.started if worker.code and worker not in self.failed]

    def _error(self) -> FtrunError:
        """A process that lost another one says less than that other."""
        found = [error for worker in self.failed if (error := worker.error)]
        first = next((error for error in found if not error.secondary), None)
        return first or self.cause or next(iter(found), ComponentError("the group of machines was dissolved"))

    def _may_start_again(self) -> bool:
        """Whether another try can end otherwise: not after a user's mistake, a lack of memory, or a wish to stop."""
        return not any(worker.code in FINAL or worker.code in STOPPED for worker in self.failed)

    def _failure(self, store: Any) -> RunResult:
        error = self._error()
        if error.secondary and self.launch.nodes > 1:
            self._hear_why(store)
        if self.cause or not self._may_start_again():
            self._remaining_restarts = 0
        if self._remaining_restarts:
            done = self._worker_group.spec.max_restarts - self._remaining_restarts + 1
            again = f"starting again from the newest checkpoint ({done} of {self.launch.restarts})"
            print(f"ftrun: {self._error().what}; {again}", file=sys.stderr, flush=True)
        return RunResult(state=WorkerState.FAILED)

    def _say_why(self, store: Any) -> None:
        """Tell the other machines that the group need not form again, and why."""
        error = self._error()
        if self.launch.nodes == 1 or error.secondary or (self._remaining_restarts and self._may_start_again()):
            return
        words = {"what": f"{self.meeting.address}: {error.what}", "where": error.where, "todo": error.todo}
        try:
            store.set(ENDED, json.dumps(words | {"exit_code": error.exit_code}))
        except (RuntimeError, OSError):
            return  # the machine of the store is gone, and with it the run

    def _hear_why(self, store: Any) -> None:
        """What another machine says of the end, if it was one that ended the run."""
        deadline = time.monotonic() + HEARD_SECONDS
        try:
            while not store.check([ENDED]):  # after a wait that timed out, torch's store answers no more
                if time.monotonic() > deadline:
                    return
                time.sleep(0.1)
            said = json.loads(store.get(ENDED))
        except (RuntimeError, OSError, RendezvousConnectionError):
            return  # nothing was said: that machine is lost, or its workers start again as ours do
        self.cause = processes.error_class(said["exit_code"])(said["what"], said["where"], said["todo"])

    def _signal_all(self, number: int) -> None:
        for worker in self.started:
            if worker.code is None:
                worker.process.send_signal(number)
