"""One reader a layout: a row under our names becomes a Record, or is unfit for training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ftrun.data.records import Message, Record
from ftrun.errors import nearest

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",  # its older name
}
ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"function": "tool"}


class Unfit(Exception):
    """A row that cannot be used; the caller knows where it stands."""

    def __init__(self, what: str, todo: str = "Repair or remove the row."):
        super().__init__(what)
        self.what, self.todo = what, todo


def _string(view: dict[str, Any], key: str, empty_ok: bool = False) -> str:
    value = view.get(key, "")
    if not isinstance(value, str):
        raise Unfit(f"has a {type(value).__name__} as {key}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Unfit(f"holds half of a surrogate pair in {key}, which is not text") from None
    if not empty_ok and not value.strip():
        raise Unfit(f"has an empty {key}")
    return value


def _optional(view: dict[str, Any], key: str) -> str | None:
    return _string(view, key) if key in view else None


def _system(view: dict[str, Any]) -> tuple[Message, ...]:
    text = _string(view, "system", empty_ok=True)
    return (Message("system", text),) if text.strip() else ()


def _prompt(view: dict[str, Any]) -> tuple[Message, ...]:
    """The prompt's messages: instruction with input or context below an empty line, or prompt as text or messages."""
    if "instruction" in view:
        parts = [_string(view, key, empty_ok=True) for key in ("instruction", "input", "context")]
        text = "\n\n".join(part for part in parts if part.strip())
    elif isinstance(view.get("prompt"), list):
        return _turns(view["prompt"], "prompt", "role", "content", ROLES)
    else:
        text = _string(view, "prompt", empty_ok=True)
    if not text.strip():
        raise Unfit(f"has an empty {'instruction' if 'instruction' in view else 'prompt'}")
    return (*_system(view), Message("user", text))


def _single(view: dict[str, Any], key: str) -> Record:
    value = view[key]
    if isinstance(value, list):
        turns = _turns(value, key, "role", "content", ROLES)
        _check_end(turns, key)
    else:
        turns = (Message("assistant", _string(view, key)),)
    return Record(
        0, "sft", messages=(*_prompt(view), *turns), answer=view.get("answer"), verifier=_optional(view, "verifier")
    )


def _alpaca(view: dict[str, Any]) -> Record:
    return _single(view, "output")


def _prompt_completion(view: dict[str, Any]) -> Record:
    return _single(view, "completion" if "completion" in view else "response")


def _binary(view: dict[str, Any]) -> Record:
    truth = {"true": 1, "false": 0, "1": 1, "0": 0}.get(str(view["label"]).strip().lower())
    if truth is None:
        raise Unfit("has a label that is neither true nor false")
    return replace(_single(view, "completion"), kind="binary", label=truth)


def _turns(value: Any, key: str, role_key: str, content_key: str, roles: dict[str, str]) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise Unfit(f"has no list of turns in {key}" if not isinstance(value, list) else f"has an empty {key}")
    turns: list[Message] = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict) or role_key not in turn:
            raise Unfit(f"has a turn {number} without {role_key} in {key}")
        role = turn[role_key]
        if not isinstance(role, str) or role not in roles:
            raise Unfit(f'has an unknown role "{role}" in turn {number} of {key}', nearest(str(role), roles))
        if turn.get("tool_calls"):
            raise Unfit(
                f"has tool calls in turn {number} of {key}, which have no text to train on",
                "Write the call into the turn's content.",
            )
        content = _parts(turn.get(content_key), number, key)
        content = _string(
            {f"turn {number} of {key}": content}, f"turn {number} of {key}", empty_ok=roles[role] in ("system", "tool")
        )
        turns.append(Message(roles[role], content))  # type: ignore[arg-type]
        if role == "system" and number > 1:
            raise Unfit(f"has a system message in turn {number} of {key}; only the first may be one")
    return tuple(turns)


def _parts(content: Any, number: int, key: str) -> Any:
    """The text of a turn whose content is a list of text parts."""
    if not isinstance(content, list):
        return "" if content is None else content
    if not all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        raise Unfit(f"has something else than text in turn {number} of {key}")
    return "".join(part["text"] for part in content)


def _check_end(turns: tuple[Message, ...], key: str) -> None:
    if turns[-1].role != "assistant":
        raise Unfit(
            f"ends with a {turns[-1].role} turn in {key}: there is no response to train on",
            "End it with the assistant's turn, or remove the row.",
        )


def _conversation(view: dict[str, Any], key: str, role_key: str, content_key: str, roles: dict[str, str]) -> Record:
    turns = _turns(view[key], key, role_key, content_key, roles)
    _check_end(turns, key)
    if turns[0].role != "system":
        turns = (*_system(view), *turns)
    if all(turn.role in ("assistant", "system") for turn in turns):
        raise Unfit(f"has no prompt in {key}, only the assistant speaks")
    return Record(0, "sft", messages=turns, answer=view.get("answer"), verifier=_optional(view, "verifier"))


def _messages(view: dict[str, Any]) -> Record:
    return _conversation(view, "messages", "role", "content", ROLES)


def _sharegpt(view: dict[str, Any]) -> Record:
    return _conversation(view, "conversations", "from", "value", SHAREGPT_ROLES)


def _preference(view: dict[str, Any]) -> Record:
    """Chosen and rejected as texts or turns after a prompt, or as two whole conversations that share all but their end."""
    if isinstance(view["chosen"], list) != isinstance(view["rejected"], list):
        raise Unfit("has turns on one side and text on the other of chosen and rejected")
    if not isinstance(view["chosen"], list):
        both = [(Message("assistant", _string(view, key)),) for key in ("chosen", "rejected")]
        if not view.keys() & {"prompt", "instruction"}:
            raise Unfit("has chosen and rejected but no prompt")
        return Record(0, "pairs", messages=_prompt(view), chosen=both[0], rejected=both[1])
    both = [_turns(view[key], key, "role", "content", ROLES) for key in ("chosen", "rejected")]
    for turns, key in zip(both, ("chosen", "rejected"), strict=True):
        _check_end(turns, key)
    if both[0][0].role == both[1][0].role == "assistant" and view.keys() & {"prompt", "instruction"}:
        return Record(0, "pairs", messages=_prompt(view), chosen=both[0], rejected=both[1])
    shared = 0
    while shared < min(len(turns) for turns in both) - 1 and both[0][shared] == both[1][shared]:
        shared += 1
    if shared == 0 or any(turn.role == "user" for turns in both for turn in turns[shared:]):
        raise Unfit("has chosen and rejected that do not share their prompt")
    prompt = both[0][:shared]
    if "prompt" in view and _prompt(view)[-1].content not in [turn.content for turn in prompt]:
        raise Unfit("has a prompt that differs from the one in chosen")
    return Record(0, "pairs", messages=prompt, chosen=both[0][shared:], rejected=both[1][shared:])


def _prompts(view: dict[str, Any]) -> Record:
    turns = _prompt(view)
    if turns[-1].role == "assistant":
        raise Unfit("has a prompt that ends with an assistant turn")
    return Record(0, "prompts", messages=turns, answer=view.get("answer"), verifier=_optional(view, "verifier"))


def _text(view: dict[str, Any]) -> Record:
    return Record(0, "text", text=_string(view, "text"))


def _classification(view: dict[str, Any]) -> Record:
    label = view["label"]
    if isinstance(label, bool) or not isinstance(label, str | int) or (isinstance(label, str) and not label.strip()):
        raise Unfit(f"has {label!r} as label, not a name or a whole number")
    return Record(0, "labels", text=_string(view, "text"), text_pair=_optional(view, "text_pair"), label=label)


READERS: dict[str, Callable[[dict[str, Any]], Record]] = {
    "preference": _preference,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "binary": _binary,
    "prompt_completion": _prompt_completion,
    "prompts": _prompts,
    "classification": _classification,
    "text": _text,
}
