"""Where the machines of a run meet: torch's rendezvous, which gives each its number, within a bounded time."""

from __future__ import annotations

import os
import socket
import time
import uuid

import psutil
from torch.distributed.elastic.rendezvous.api import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from ftrun.config.settings import LaunchConfig
from ftrun.errors import ComponentError, ConfigError

HEARTBEAT_SECONDS, HEARTBEATS = 2, 3  # a machine that is silent for so many of them is gone


class Meeting(RendezvousHandler):
    """A c10d rendezvous that is entered anew when the machine that held it was lost."""

    def __init__(self, launch: LaunchConfig):
        self.launch = launch
        self.endpoint = launch.rendezvous if launch.nodes > 1 and launch.rendezvous else "127.0.0.1:0"
        self.host, _, port = self.endpoint.rpartition(":")
        self.port = int(port)
        self.run_id = "ftrun" if launch.nodes > 1 else uuid.uuid4().hex
        self.address = self._own_address()
        self._inner: RendezvousHandler | None = None

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet the other machines. Raises ComponentError when they do not all come in time."""
        deadline = time.monotonic() + self.launch.timeout * 60
        while True:
            try:
                if self._inner is None:
                    self._inner = self._enter(deadline)
                return self._inner.next_rendezvous()
            except RendezvousConnectionError:
                self._inner = None
                if time.monotonic() > deadline:
                    raise self._nobody() from None
                time.sleep(0.5)
            except RendezvousTimeoutError:
                raise self._nobody() from None

    def num_nodes_waiting(self) -> int:
        """Machines that want to join. What a lost connection means, the workers will say."""
        try:
            return self._inner.num_nodes_waiting() if self._inner else 0
        except RendezvousConnectionError:
            self._inner = None
            return 0

    def get_backend(self) -> str:
        return "c10d"

    def get_run_id(self) -> str:
        return self.run_id

    def is_closed(self) -> bool:
        return self._inner is not None and self._inner.is_closed()

    def set_closed(self) -> None:
        if self._inner is not None:
            self._inner.set_closed()

    def shutdown(self) -> bool:
        """Leave, so that nobody waits for this machine."""
        try:
            return self._inner is None or self._inner.shutdown()
        except RendezvousConnectionError:
            return True  # the machine that held it has left first

    def _enter(self, deadline: float) -> RendezvousHandler:
        # torch shares one store between all rounds, and then tells a machine that comes back of none
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        left = max(1, int(deadline - time.monotonic()))
        last: RendezvousConnectionError | None = None
        for holds in (True, False) if self._is_here() else (False,):
            if not holds:
                self._wait_for_host(deadline)
            parameters = RendezvousParameters(
                backend="c10d",
                endpoint=self.endpoint,
                run_id=self.run_id,
                min_nodes=self.launch.nodes,
                max_nodes=self.launch.nodes,
                local_addr=self.address,
                is_host=str(holds),
                join_timeout=left,
                keep_alive_interval=HEARTBEAT_SECONDS,
                keep_alive_max_attempt=HEARTBEATS,
            )
            try:
                backend, store = create_backend(parameters)
                return create_handler(store, backend, parameters)
            except RendezvousConnectionError as error:
                last = error  # another process of this machine holds it
        assert last is not None
        raise last

    def _wait_for_host(self, deadline: float) -> None:
        """Wait where a signal can end it, which torch's own waiting does not let through."""
        while True:
            try:
                socket.create_connection((self.host, self.port), timeout=2).close()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise self._nobody() from None
                time.sleep(0.2)

    def _is_here(self) -> bool:
        """Whether the rendezvous lies on this machine: only then can its address be bound."""
        for family, kind, protocol, _, address in self._addresses():
            with socket.socket(family, kind, protocol) as probe:
                try:
                    probe.bind((address[0], 0))
                    return True
                except OSError:
                    continue
        return False

    def _own_address(self) -> str:
        """This machine's address as the others reach it: the one that the way to the rendezvous starts from."""
        family, _, _, _, address = self._addresses()[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((address[0], self.port or 9))
            except OSError as error:
                raise self._unreachable(str(error)) from error
            return probe.getsockname()[0]

    def _addresses(self) -> list[tuple]:
        try:
            return socket.getaddrinfo(self.host.strip("[]"), self.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise self._unreachable(str(error)) from error

    def _unreachable(self, why: str) -> ConfigError:
        return ConfigError(
            f"{self.host} cannot be reached: {why}",
            f"launch.rendezvous={self.endpoint}",
            "Give the name or address of one of the machines as the others see it.",
        )

    def _nobody(self) -> ComponentError:
        return ComponentError(
            f"{self.launch.nodes} machines did not all meet at {self.endpoint} within {self.launch.timeout:g} minutes",
            f"launch.nodes={self.launch.nodes} launch.rendezvous={self.endpoint}",
            "Start the same command on all of them, with that port open between them; launch.timeout says how long they wait.",
        )


def interface_of(address: str) -> str:
    """The network interface that has this address of the machine."""
    for name, found in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in found):
            return name
    raise ConfigError(f"no network interface of this machine has the address {address}", "launch.rendezvous")
