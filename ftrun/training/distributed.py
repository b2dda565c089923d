"""The processes of a run, as Accelerate sees them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.rendezvous import rendezvous

from ftrun.config.settings import LaunchConfig
from ftrun.errors import ComponentError, ConfigError
from ftrun.runs.cores import OMP, threads_per_process
from ftrun.training.launch import end_now
from ftrun.training.watch import Watch

PATIENCE = timedelta(days=7)  # of collectives
Item = TypeVar("Item")


class Team:
    """Rank, device and the few collectives that a run needs.

    A stage may take hours on one rank while the others wait, so collectives do not time out by themselves. A process
    that dies ends the others through the launcher; one that hangs is named by those that wait for it.
    """

    def __init__(self, launch: LaunchConfig, trackers: list[str] | None = None, folder: str | None = None):
        wanted = launch.processes * launch.nodes
        on_cpu = launch.device == "cpu" or (launch.device == "auto" and not torch.cuda.is_available())
        if launch.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                "launch.device=cuda, but no GPU is visible", todo="Use launch.device=auto, and see `ftrun doctor`."
            )
        if on_cpu:
            os.environ["ACCELERATE_USE_CPU"] = "true"
        threads = threads_per_process(launch.threads, launch.processes)
        torch.set_num_threads(threads)
        if wanted > 1:
            os.environ.setdefault(OMP, str(threads))  # else Accelerate takes a number of its own
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            _form_group("gloo" if on_cpu else "nccl", launch.timeout)
        loggers: list[Any] = list(trackers or [])
        self.accelerator = Accelerator(cpu=on_cpu, log_with=loggers or None, project_dir=folder)
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        if self.world_size != wanted:
            error = ConfigError(
                f"{wanted} processes were asked for, {self.world_size} came up",
                f"launch.processes={launch.processes} launch.nodes={launch.nodes}",
                "Start ftrun without a launcher of your own, or set launch.processes to what it starts on each machine.",
            )
            error.secondary = self.rank > 0
            raise error
        if self.world_size > 1:
            self.watch = Watch(self.rank, self.world_size, launch.timeout * 60, end_now)

    watch: Watch | None = None  # of several processes
    splits: bool = True  # work on a model can be divided; with a slice of it in each process, all do all of it

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def alive(self, where: str) -> None:
        """This process makes progress; ``where`` is what it is at."""
        if self.watch:
            self.watch.moved(where)

    @contextmanager
    def at_work(self, where: str) -> Iterator[None]:
        """The body may take as long as it likes without a sign of progress."""
        self.alive(where)
        if self.watch:
            self.watch.busy = True
        try:
            yield
        finally:
            if self.watch:
                self.watch.busy = False

    def _meeting(self, name: str) -> AbstractContextManager[None]:
        return self.watch.meeting(name) if self.watch else nullcontext()

    def barrier(self) -> None:
        if self.world_size > 1:
            with self._meeting("a barrier"):
                dist.barrier()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over all processes."""
        if self.world_size > 1:
            with self._meeting("a sum"):
                dist.all_reduce(values)
        return values

    def gather_object(self, value: Any) -> list[Any]:
        """The value of every process, in rank order, on every process."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        with self._meeting("an exchange"):
            dist.all_gather_object(gathered, value)
        return gathered

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Those that this process works on with the model."""
        return items[self.rank :: self.world_size] if self.splits else items

    def collect(self, made: Item) -> list[Item]:
        """What all processes have made of their shares, each piece once, on every process."""
        return self.gather_object(made) if self.splits else [made]

    @contextmanager
    def in_turns(self) -> Iterator[None]:
        """The body is run by one process of a machine after the other: none needs the memory at the same time."""
        local = self.accelerator.local_process_index
        for turn in range(max(self.gather_object(local)) + 1):
            if turn == local:
                yield
            self.barrier()

    def broadcast_(self, tensors: list[torch.Tensor]) -> None:
        """Overwrite with the values of process 0."""
        if self.world_size > 1:
            with self._meeting("a broadcast"):
                for tensor in tensors:
                    dist.broadcast(tensor.data, src=0)

    def lost_another(self, error: Exception) -> bool:
        """Whether ``error`` only says that another process is gone."""
        words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "gloo")
        return (
            self.world_size > 1
            and isinstance(error, (RuntimeError, OSError))
            and any(word in str(error) for word in words)
        )

    def close(self) -> None:
        if self.watch:
            self.watch.close()
        self.accelerator.end_training()
        if dist.is_initialized():
            dist.destroy_process_group()


def _form_group(backend: str, minutes: float) -> None:
    """Meet the other processes. Raises ComponentError when they do not all come in time."""
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timedelta(minutes=minutes)))
    except (RuntimeError, TimeoutError, OSError) as problem:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ComponentError(
            f"{os.environ['WORLD_SIZE']} processes did not all meet at {place} within {minutes:g} minutes",
            f"MASTER_ADDR, MASTER_PORT: {str(problem).splitlines()[0][:200]}",
            "Start all of them, with that address and port open to each; launch.timeout says how long they wait.",
        ) from problem
    store.set_timeout(PATIENCE)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
