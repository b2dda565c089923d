"""Rows of any data layout as prompt and response, for reading."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

PROMPTS = ("instruction", "prompt", "question", "query", "problem", "text")
RESPONSES = ("output", "completion", "response", "answer", "solution", "chosen", "label")
TURNS = ("messages", "conversations")


def prompt_and_response(row: Mapping[str, Any]) -> tuple[str, str]:
    """What is asked and what is answered; a row of an unknown layout is shown whole as the prompt."""
    for key in TURNS:
        if isinstance(row.get(key), list) and row[key]:
            turns = [_turn(turn) for turn in row[key]]
            return "\n".join(turns[:-1]), turns[-1]
    prompt = next((_text(row[key]) for key in PROMPTS if row.get(key)), "")
    if row.get("input"):
        prompt = f"{prompt}\n{_text(row['input'])}".strip()
    response = next((_text(row[key]) for key in RESPONSES if row.get(key) not in (None, "")), "")
    if prompt or response:
        return prompt, response
    return json.dumps({key: value for key, value in row.items() if key != "id"}, ensure_ascii=False, default=str), ""


def _turn(turn: Any) -> str:
    if not isinstance(turn, Mapping):
        return str(turn)
    role = turn.get("role") or turn.get("from") or ""
    return f"{role}: {_text(turn.get('content') or turn.get('value') or '')}"


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(turn, Mapping) for turn in value):
        return "\n".join(_turn(turn) for turn in value)
    return json.dumps(value, ensure_ascii=False, default=str)
