"""HTML that is escaped unless it says that it is HTML already."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable
from typing import Any

VOID = {"meta", "br", "hr", "wbr"}


class Markup(str):
    """Text that is HTML already."""


Content = str | int | Iterable[Any] | None


def escape(content: Content) -> Markup:
    """HTML of any content; plain text is escaped, control characters are made visible, None is nothing."""
    if content is None:
        return Markup("")
    if isinstance(content, Markup):
        return content
    if isinstance(content, str | int):
        return Markup(html.escape(str(content).translate(_VISIBLE)))
    return Markup("".join(escape(part) for part in content))


_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"}
_VISIBLE |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)  # lone surrogates cannot be written as UTF-8


def tag(name: str, /, *content: Content, **attributes: str | float | bool | None) -> Markup:
    """One element. ``class_`` spells class, ``stroke_width`` stroke-width; attributes that are None or False are left out."""
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(key)
            continue
        text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
        words.append(f'{key}="{escape(str(text))}"')
    opening = Markup(f"<{' '.join(words)}>")
    return opening if name in VOID else Markup(f"{opening}{escape(content)}</{name}>")


def template_markers(text: str) -> list[Content]:
    """The text with markers of a chat template, such as ``<|im_start|>``, set small."""
    parts = re.split(r"(<\|[^\s<>|]+\|>|</?s>)", text)
    return [tag("span", part, class_="marker") if at % 2 else part for at, part in enumerate(parts)]


def clipped(text: str, limit: int = 220, shown: Callable[[str], Content] = str) -> Markup:
    """Text that unfolds when it is long; ``shown`` sets it."""
    text = text.strip()
    if len(text) <= limit:
        return tag("div", shown(text), class_="text")
    cut = text.rfind(" ", limit - 40, limit)
    head = text[: cut if cut > 0 else limit]
    return tag(
        "details",
        tag("summary", shown(head), tag("span", " … ", class_="more")),
        tag("div", shown(text), class_="text"),
        class_="clip",
    )
