"""Messages of libraries that a user can do nothing about. Each filter is for one message of one library."""

from __future__ import annotations

import logging
import os

# logger -> how its message starts
SETTLED = {
    # a faster product for inference, which is not used here: weights that are trained through are never packed
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
}


class Settled(logging.Filter):
    """Lets everything of a logger through but one message."""

    def __init__(self, start: str):
        super().__init__()
        self.start = start

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.start)


def hush() -> None:
    """Put the filters in place, before the libraries are imported; a second call changes nothing."""
    # torch's C++ side warns of names that the network does not have, and of every step whose parameters were all used
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name, start in SETTLED.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, Settled) for known in logger.filters):
            logger.addFilter(Settled(start))
