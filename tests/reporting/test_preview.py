"""Rows as trained, on a terminal and as a page."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console
from test_html import EVIL, Page

from ftrun.reporting.preview import PreviewRow, preview_html, preview_terminal
from ftrun.reporting.weights import is_special, level

ROWS = [
    PreviewRow(3, ["<|im_start|>", "user", "\n", "Hi", "<|im_end|>", " yes", " no", "\x1b[31m", "<|im_end|>"], [0, 0, 0, 0, 0, 1, 1, 0.25, 1], "packed with 4"),
    PreviewRow(4, ["a", "[/b]", EVIL], [0, 0, 1]),
]  # fmt: skip
COUNTS = {"rows": 340, "tokens": 48_000, "trained_tokens": 12_000, "dropped": {"too long": 3, "nothing to train on": 1}}


def shown(**options) -> str:
    console = Console(file=io.StringIO(), width=200, highlight=False, **options)
    preview_terminal(ROWS, COUNTS, "demo: rows.jsonl", console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_header_counts_everything():
    lines = shown().splitlines()
    assert lines[0] == "demo: rows.jsonl"
    assert lines[1] == "340 rows, 48,000 tokens, 12,000 of them trained (25.0%)"
    assert lines[2:4] == ["3 rows dropped: too long", "1 row dropped: nothing to train on"]


def test_without_colours_trained_tokens_stand_in_brackets():
    text = shown()
    assert "row 3 · 9 tokens · 4 trained · packed with 4" in text
    assert "<|im_start|>user↵\nHi<|im_end|>⟦ yes no⟧⟦␛[31m⟧0.25⟦<|im_end|>⟧" in text
    assert "\x1b" not in text, "an escape in the data does not reach the terminal"
    assert f"a[/b]⟦{EVIL}⟧" in text


def test_colours_follow_the_weight():
    text = shown(force_terminal=True, color_system="256")
    assert "\x1b[90mHi\x1b[0m" in text, "grey: not trained"
    assert "\x1b[32m yes\x1b[0m" in text, "green: weight 1"
    assert re.search(r"\x1b\[38;5;\d+m␛\[31m", text), "a shade between"
    assert "\x1b[7;32m<|im_end|>" in text, "special tokens stand out"


def test_page(tmp_path):
    path = preview_html(ROWS, COUNTS, EVIL, tmp_path / "preview.html")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "<script" not in text and EVIL in page.text and "3 rows dropped: too long" in page.text
    looks = [attrs["class"] for tag, attrs in page.tags if tag == "span" and "token" in (attrs.get("title") or "")]
    assert len(looks) == 12
    assert [look.split()[1] for look in looks[:9]] == ["w0"] * 5 + ["w5", "w5", "w2", "w5"]
    assert [at for at, look in enumerate(looks) if "special" in look] == [0, 4, 8]


@pytest.mark.parametrize(
    "token", ["<|im_end|>", "<s>", "</s>", "<bos>", "[SEP]", "[INST]", "<start_of_turn>", "<extra_id_0>"]
)
def test_special(token):
    assert is_special(token)


@pytest.mark.parametrize("token", ["a", "<", "<>", " < b >", "[ok]", "[1]", "\n", "", "<a b>"])
def test_not_special(token):
    assert not is_special(token)


def test_levels():
    assert [level(w) for w in (0, -1, float("nan"), 1e-6, 0.3, 0.99, 1, 7)] == [0, 0, 0, 1, 2, 4, 5, 5]
    assert level(1.0, top=4.0) == 2
