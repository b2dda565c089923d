"""Nothing is printed at start that a user can do nothing about; everything else comes through."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest

from ftrun.quiet import SETTLED, hush


@pytest.mark.parametrize("name", SETTLED)
def test_one_message_and_no_other(name, caplog):
    hush()
    hush()
    assert len(logging.getLogger(name).filters) == 1
    with caplog.at_level(logging.WARNING, name):
        logging.getLogger(name).warning(SETTLED[name] + ": %s", "no module named kernels")
        logging.getLogger(name).warning("something else went wrong")
    assert [record.getMessage() for record in caplog.records] == ["something else went wrong"]


def test_bitsandbytes_still_says_it_like_that():
    """The logger's name and the words are those of the installed version."""
    package = importlib.util.find_spec("bitsandbytes")
    assert package and package.origin
    source = (Path(package.origin).parent / "backends" / "cpu" / "ops.py").read_text()
    assert SETTLED["bitsandbytes.backends.cpu.ops"] in source and "getLogger(__name__)" in source
