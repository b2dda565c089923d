"""The turns of a conversation, in whatever words their keys and roles are written."""

from __future__ import annotations

import json
import math
from typing import Any

from ftrun.data.meanings import THOUGHTS, Unfit, loss_weight, missing, refuse_turn_keys
from ftrun.data.records import Message, Role
from ftrun.errors import nearest

# role as people write it, in any case -> ours
ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot", "ai", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "function_response", "ipython"), "tool"),
}  # type: ignore[assignment]
CALLS = ("function_call", "tool_call")  # roles whose text is a call
TEXTS = ("text", "input_text", "output_text")  # types of a part that is text
THINKING = ("thinking", "reasoning")


def text_of(value: Any, name: str, empty_ok: bool = False) -> str:
    """A cell as text: numbers are written out. Raises Unfit for what is no text, and for an empty one."""
    if missing(value):
        value = ""
    if (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and (isinstance(value, int) or math.isfinite(value))
    ):
        value = json.dumps(value)
    if not isinstance(value, str):
        raise Unfit(f"has a {type(value).__name__} as {name}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Unfit(f"holds half of a surrogate pair in {name}, which is not text") from None
    if not empty_ok and not value.strip():
        raise Unfit(f"has an empty {name}")
    return value


def read_turns(value: Any, key: str) -> tuple[Message, ...]:
    """The messages of a list of turns, written as JSON or not. Raises Unfit, naming the turn."""
    value = from_json(value)
    if not isinstance(value, list) or not value:
        raise Unfit(f"has no list of turns in {key}" if not isinstance(value, list) else f"has an empty {key}")
    return tuple(_message(turn, number, key) for number, turn in enumerate(value, start=1))


def messages_of(row: dict[str, Any]) -> tuple[Message, ...]:
    """The conversation of a row that `Message.turn` wrote."""
    return read_turns(row["messages"], "messages")


def from_json(value: Any) -> Any:
    """A list or object that a cell holds as JSON text; other values as they are."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _message(turn: Any, number: int, key: str) -> Message:
    place = f"turn {number} of {key}"
    if not isinstance(turn, dict) or missing(turn.get("role", turn.get("from"))):
        raise Unfit(f"has a turn {number} without role in {key}", 'Write {"role": ..., "content": ...}.')
    written = turn.get("role", turn.get("from"))
    role = ROLES.get(written.strip().lower()) if isinstance(written, str) else None
    if role is None:
        raise Unfit(f'has an unknown role "{written}" in {place}', nearest(str(written), ROLES))
    refuse_turn_keys(turn, number, key)
    said, thoughts = _parts(turn.get("content", turn.get("value")), place)
    thought = _thought(turn, thoughts, place)
    if thought and role != "assistant":
        raise Unfit(f"has a thought in {place}, which the {role} speaks")
    spelled = str(written).strip().lower() in CALLS
    calls = _calls(said, place) if spelled else _tool_calls(turn, place)
    if calls and role != "assistant":
        raise Unfit(f"has tool calls in {place}, which the {role} speaks")
    content = text_of(said, place, empty_ok=role in ("system", "tool") or bool(calls) or bool(thought))
    name, call_id = turn.get("name"), turn.get("tool_call_id")
    return Message(
        role,
        content,
        weight=loss_weight(turn, place),
        thought=thought,
        calls=calls,
        spelled=spelled,
        name=name if isinstance(name, str) and name else None,
        call_id=call_id if isinstance(call_id, str) and call_id else None,
    )


def _parts(content: Any, place: str) -> tuple[Any, list[str]]:
    """What a turn says, and what it thinks, where its content is a list of parts."""
    if not isinstance(content, list):
        return content, []
    said, thoughts = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in TEXTS and isinstance(part.get("text"), str):
            said.append(part["text"])
        elif kind in THINKING:
            inner = part.get(kind, part.get("text"))
            thoughts.append(inner if isinstance(inner, str) else str(_parts(inner, place)[0] or ""))
        else:
            raise Unfit(f"has something else than text in {place}")
    return "".join(said), thoughts


def _thought(turn: dict[str, Any], parts: list[str], place: str) -> str:
    given = {text_of(turn[key], f"{key} of {place}", empty_ok=True) for key in THOUGHTS if key in turn}
    given |= {"".join(parts)} if parts else set()
    given = {text for text in given if text.strip()}
    if len(given) > 1:
        raise Unfit(f"has two different thoughts in {place}")
    return next(iter(given), "")


# ---- calls of tools ----


def _tool_calls(turn: dict[str, Any], place: str) -> tuple[dict[str, Any], ...]:
    listed, single = from_json(turn.get("tool_calls")), from_json(turn.get("function_call"))
    calls = [] if missing(listed) or listed == "" else listed if isinstance(listed, list) else [listed]
    calls = [*calls, *([single] if single and not missing(single) else [])]
    return tuple(_call(call, place) for call in calls)


def _calls(said: Any, place: str) -> tuple[dict[str, Any], ...]:
    """The calls that the text of a turn with the role of a call is."""
    found = from_json(said)
    return tuple(_call(call, place) for call in (found if isinstance(found, list) else [found]))


def _call(call: Any, place: str) -> dict[str, Any]:
    """The call as templates take it, its arguments as an object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unfit(f"has tool calls without a name in {place}", 'Write {"name": ..., "arguments": {...}}.')
    arguments = function.get("arguments", function.get("parameters"))
    arguments = {} if missing(arguments) or arguments == "" else from_json(arguments)
    named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**named, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def read_tools(value: Any, key: str) -> tuple[dict[str, Any], ...]:
    """The tools that a row offers, as the descriptions that templates take. Raises Unfit for anything else."""
    listed = from_json(value)
    if missing(listed) or listed in ("", [], {}):
        return ()
    listed = listed if isinstance(listed, list) else [listed]
    tools = []
    for tool in map(from_json, listed):
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise Unfit(
                f"has {key} that are no list of descriptions",
                f'Write {{"name": ..., "parameters": {{...}}}} for each, or leave the column out with data.ignore=[{key}].',
            )
        tools.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tuple(tools)
