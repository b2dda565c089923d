"""Progress bars of transformers, which would write across ftrun's own display."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging


@contextmanager
def without_bars() -> Iterator[None]:
    """No "Loading weights" and "Writing model shards" in here; warnings still come through."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def without_gguf_bar() -> Iterator[None]:
    """No "Converting and de-quantizing GGUF tensors", a bar that transformers' own switch leaves on."""
    from transformers import modeling_gguf_pytorch_utils

    reader: Any = modeling_gguf_pytorch_utils
    shown = reader.tqdm
    reader.tqdm = functools.partial(shown, disable=True)
    try:
        yield
    finally:
        reader.tqdm = shown
