"""One reader a layout: a row under our names becomes a Record, or is unfit for training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ftrun.data.meanings import Unfit, loss_weight, says_something
from ftrun.data.records import Message, Record, answers
from ftrun.data.turns import from_json, read_tools, read_turns, text_of

FEEDBACK = ("label", "kto_tag")  # columns that say whether an answer is wanted


def _string(view: dict[str, Any], key: str, empty_ok: bool = False) -> str:
    return text_of(view.get(key), key, empty_ok)


def _optional(view: dict[str, Any], key: str) -> str | None:
    return _string(view, key) if key in view else None


def _system(view: dict[str, Any]) -> tuple[Message, ...]:
    text = _string(view, "system", empty_ok=True)
    return (Message("system", text),) if text.strip() else ()


def _history(view: dict[str, Any]) -> tuple[Message, ...]:
    """The turns before the row's own, of pairs of request and answer."""
    pairs = from_json(view.get("history"))
    if not says_something(pairs):
        return ()
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise Unfit(
            "has a history that is no list of pairs, a request and its answer each",
            "Repair it, or leave the column out with data.ignore=[history].",
        )
    turns = []
    for number, (asked, answer) in enumerate(pairs, start=1):
        turns.append(Message("user", text_of(asked, f"pair {number} of history")))
        turns.append(Message("assistant", text_of(answer, f"pair {number} of history")))
    return tuple(turns)


def _prompt(view: dict[str, Any]) -> tuple[Message, ...]:
    """The prompt's messages: instruction with input or context below an empty line, or prompt as text or messages."""
    if "instruction" in view:
        parts = [_string(view, key, empty_ok=True) for key in ("instruction", "input", "context")]
        text = "\n\n".join(part for part in parts if part.strip())
    elif isinstance(view.get("prompt"), list):
        turns = read_turns(view["prompt"], "prompt")
        before = (*_system(view), *_history(view))
        return turns if turns[0].role == "system" and not before else _led(turns, before)
    else:
        text = _string(view, "prompt", empty_ok=True)
    if not text.strip():
        raise Unfit(f"has an empty {'instruction' if 'instruction' in view else 'prompt'}")
    return (*_system(view), *_history(view), Message("user", text))


def _led(turns: tuple[Message, ...], before: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns with those of the row's columns in front; a system turn of their own stays the first and only."""
    if turns[0].role != "system":
        return (*before, *turns)
    return (turns[0], *(turn for turn in before if turn.role != "system"), *turns[1:])


def _tools(view: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    found = [read_tools(view[key], key) for key in ("tools", "functions") if key in view]
    return next((tools for tools in found if tools), ())


def weighed(record: Record, view: dict[str, Any]) -> Record:
    """The record with the weight of the whole row on each of its answers."""
    factor = loss_weight(view, "the row", row=True)
    if factor is None:
        return record

    def turns(messages: tuple[Message, ...]) -> tuple[Message, ...]:
        return tuple(
            replace(turn, weight=factor * (1.0 if turn.weight is None else turn.weight))
            if turn.role == "assistant" and (at in answers(messages) or messages is not record.messages)
            else turn
            for at, turn in enumerate(messages)
        )

    parts = {name: turns(getattr(record, name)) for name in ("messages", "chosen", "rejected")}
    return replace(record, **parts)


def _single(view: dict[str, Any], key: str) -> Record:
    value = view[key]
    if isinstance(value, list):
        turns = read_turns(value, key)
        _check_end(turns, key)
    else:
        turns = (Message("assistant", _string(view, key)),)
    return _sft(view, (*_prompt(view), *turns))


def _sft(view: dict[str, Any], messages: tuple[Message, ...]) -> Record:
    return Record(
        0,
        "sft",
        messages=messages,
        tools=_tools(view),
        answer=view.get("answer"),
        verifier=_optional(view, "verifier"),
    )


def _alpaca(view: dict[str, Any]) -> Record:
    return _single(view, "output")


def _prompt_completion(view: dict[str, Any]) -> Record:
    return _single(view, "completion" if "completion" in view else "response")


def _check_end(turns: tuple[Message, ...], key: str) -> None:
    if turns[-1].role != "assistant":
        raise Unfit(
            f"ends with a {turns[-1].role} turn in {key}: there is no response to train on",
            "End it with the assistant's turn, or remove the row.",
        )


def _conversation(view: dict[str, Any], key: str) -> Record:
    turns = read_turns(view[key], key)
    _check_end(turns, key)
    turns = _led(turns, _system(view))
    if all(turn.role in ("assistant", "system") for turn in turns):
        raise Unfit(f"has no prompt in {key}, only the assistant speaks")
    return _sft(view, turns)


def _messages(view: dict[str, Any]) -> Record:
    return _conversation(view, "messages")


def _sharegpt(view: dict[str, Any]) -> Record:
    return _conversation(view, "conversations")


def _binary(view: dict[str, Any]) -> Record:
    """An answer in any layout, and whether it is wanted."""
    label = next(view[key] for key in FEEDBACK if key in view)
    truth = {"true": 1, "false": 0, "1": 1, "0": 0, "1.0": 1, "0.0": 0}.get(str(label).strip().lower())
    if truth is None:
        raise Unfit(
            f"has a label that is neither true nor false: {label!r}",
            "Repair it, or name the format with data.format if it is no feedback.",
        )
    chat = next((key for key in ("messages", "conversations") if key in view), None)
    answer = next((key for key in ("completion", "response", "output") if key in view), "completion")
    record = _conversation(view, chat) if chat else _single(view, answer)
    return replace(record, kind="binary", label=truth)


# ---- pairs ----


def _preference(view: dict[str, Any]) -> Record:
    """Two answers to one prompt: texts, turns, or whole conversations that share all but their end."""
    asked, chosen, rejected = _sides(view)
    if chosen == rejected:
        raise Unfit("has a chosen answer that equals the rejected one: neither can be preferred")
    return Record(0, "pairs", messages=asked, chosen=chosen, rejected=rejected, tools=_tools(view))


def _sides(view: dict[str, Any]) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """The prompt, and what follows it on either side."""
    if "rejected_response" in view:
        record = _conversation(view, "messages" if "messages" in view else "conversations")
        return record.prompt, record.messages[-1:], _answer(view, "rejected_response")
    if isinstance(_value(view, "chosen"), str) != isinstance(_value(view, "rejected"), str):
        raise Unfit("has turns on one side and text on the other of chosen and rejected")
    chosen, rejected = (_answer(view, key) for key in ("chosen", "rejected"))
    if chosen[0].role == rejected[0].role == "assistant":
        return _asked(view), chosen, rejected
    return _shared(view, chosen, rejected)


def _value(view: dict[str, Any], key: str) -> Any:
    """Text as text, a turn as a list of one."""
    value = view[key]
    return [value] if isinstance(value, dict) else value if isinstance(value, list) else text_of(value, key)


def _answer(view: dict[str, Any], key: str) -> tuple[Message, ...]:
    value = _value(view, key)
    if isinstance(value, str):
        return (Message("assistant", value),)
    turns = read_turns(value, key)
    _check_end(turns, key)
    return turns


def _asked(view: dict[str, Any]) -> tuple[Message, ...]:
    """The prompt of a pair: prompt or instruction, or the conversation that both sides answer."""
    if view.keys() & {"prompt", "instruction"}:
        return _prompt(view)
    key = next((key for key in ("messages", "conversations") if key in view), None)
    if key is None:
        raise Unfit("has chosen and rejected but no prompt")
    turns = _led(read_turns(view[key], key), _system(view))
    if turns[-1].role not in ("user", "tool"):
        raise Unfit(f"ends with a {turns[-1].role} turn in {key}, which chosen and rejected cannot answer")
    return turns


def _shared(
    view: dict[str, Any], chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """Two whole conversations, taken apart where they part."""
    at = 0
    while at < min(len(chosen), len(rejected)) - 1 and chosen[at] == rejected[at]:
        at += 1
    if at == 0 or any(turn.role == "user" for turns in (chosen, rejected) for turn in turns[at:]):
        raise Unfit("has chosen and rejected that do not share their prompt")
    prompt = chosen[:at]
    if "prompt" in view and _prompt(view)[-1].content not in [turn.content for turn in prompt]:
        raise Unfit("has a prompt that differs from the one in chosen")
    return _led(prompt, (*_system(view), *_history(view))), chosen[at:], rejected[at:]


# ---- the others ----


def _prompts(view: dict[str, Any]) -> Record:
    turns = _prompt(view)
    if turns[-1].role == "assistant":
        raise Unfit("has a prompt that ends with an assistant turn")
    return Record(
        0,
        "prompts",
        messages=turns,
        tools=_tools(view),
        answer=view.get("answer"),
        verifier=_optional(view, "verifier"),
    )


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
