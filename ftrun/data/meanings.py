"""Keys that mean something in the layouts people use: how each is honoured, or why it is refused.

A key that stands in neither table means nothing here: it stays in the row, and nothing is made of it. `data.ignore`
takes a column's meaning away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class Unfit(Exception):
    """A row that cannot be used; the caller knows where it stands."""

    def __init__(self, what: str, todo: str = "Repair or remove the row."):
        super().__init__(what)
        self.what, self.todo = what, todo


@dataclass(frozen=True)
class Meaning:
    """What a key says, and what becomes of it."""

    layouts: tuple[str, ...]  # where it has this meaning
    honoured: str = ""  # how
    refused: str = ""  # or why not; a value that says nothing (null, empty) never is


CHATS = ("messages", "sharegpt")
ASKED = ("alpaca", "prompt_completion", "binary", "preference", "prompts")
ALL = (*CHATS, *ASKED)
PICTURES = "is trained with pictures or sound, and ftrun trains on text"
HALF = "is half of a preference: chosen and rejected belong together"

# key of a row -> its meaning
ROW: dict[str, Meaning] = {
    "system": Meaning(ALL, honoured="stands first, as a system turn, where the conversation has none"),
    "history": Meaning(ASKED, honoured="its pairs of request and answer stand before the row's own"),
    "tools": Meaning(ALL, honoured="handed to the chat template; refused where that does not write them"),
    "functions": Meaning(ALL, honoured="an older name of tools"),
    "weight": Meaning(ALL, honoured="factor on the loss of the row's answers"),
    "train": Meaning(ALL, honoured="false: the row carries no loss"),
    "loss": Meaning(ALL, honoured="false: the row carries no loss; a number is a measurement, and means nothing"),
    "label": Meaning((*CHATS, "alpaca", "prompt_completion"), honoured="true or false: feedback (format binary)"),
    "kto_tag": Meaning((*CHATS, "alpaca", "prompt_completion"), honoured="another name of that label"),
    "chosen": Meaning(ALL, honoured="with rejected: a pair (format preference)", refused=HALF),
    "rejected": Meaning(ALL, honoured="with chosen: a pair (format preference)", refused=HALF),
    "rejected_response": Meaning(CHATS, honoured="with messages: a pair, whose chosen answer is the last turn"),
    "mask": Meaning(CHATS, refused="names a speaker who carries no loss; say so with weight in each turn"),
    "chat_template_kwargs": Meaning(ALL, refused="changes how the chat template writes this row"),
    "images": Meaning(ALL, refused=PICTURES),
    "videos": Meaning(ALL, refused=PICTURES),
    "audios": Meaning(ALL, refused=PICTURES),
}

# key of a turn -> its meaning
WEIGHTS = ("weight", "loss_weight", "loss_scale", "train", "training", "trainable", "loss")
MASKS = ("mask", "masked")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
TURN: dict[str, Meaning] = {
    **{key: Meaning(CHATS, honoured="0 or false: the turn carries no loss; a number: its weight") for key in WEIGHTS},
    **{key: Meaning(CHATS, honoured="true or 1: the turn carries no loss") for key in MASKS},
    **{key: Meaning(CHATS, honoured="handed to the chat template; refused where it drops it") for key in THOUGHTS},
    "tool_calls": Meaning(CHATS, honoured="handed to the chat template, trained; refused where it drops them"),
    "function_call": Meaning(CHATS, honoured="an older form of tool_calls"),
    "tool_call_id": Meaning(CHATS, honoured="handed to the chat template"),
    "name": Meaning(CHATS, honoured="handed to the chat template"),
    "train_detail": Meaning(CHATS, refused="trains parts of a turn; only whole turns can be weighed"),
    "training_detail": Meaning(CHATS, refused="trains parts of a turn; only whole turns can be weighed"),
    "refusal": Meaning(CHATS, refused="is an answer beside the content; write it into the content"),
    "images": Meaning(CHATS, refused=PICTURES),
    "videos": Meaning(CHATS, refused=PICTURES),
    "audio": Meaning(CHATS, refused=PICTURES),
}


def missing(value: Any) -> bool:
    """Whether a cell holds nothing: null, or the NaN that tables write for it."""
    return value is None or (isinstance(value, float) and value != value)


def says_something(value: Any) -> bool:
    return not missing(value) and value not in ("", [], {})


def refuse_row_keys(view: dict[str, Any], layout: str, forced: bool) -> None:
    """Raise Unfit for a key that means what cannot be done; half of a pair passes where the user named the format."""
    for key in view.keys() & ROW.keys():
        meaning = ROW[key]
        if not meaning.refused or layout not in meaning.layouts or not says_something(view[key]):
            continue
        if key == "mask" and str(view[key]).lower() in ("user", "human", "false", "0"):
            continue  # what happens anyway
        if meaning.refused == HALF and (layout == "preference" or forced):
            continue
        way = "Name the format with data.format, or" if meaning.refused == HALF else "Remove it, or"
        raise Unfit(f'has a column "{key}", which {meaning.refused}', f"{way} leave it out with data.ignore=[{key}].")


def refuse_turn_keys(turn: dict[str, Any], number: int, key: str) -> None:
    """Raise Unfit for a key of a turn that means what cannot be done."""
    for name in turn.keys() & TURN.keys():
        if TURN[name].refused and says_something(turn[name]):
            raise Unfit(f'has "{name}" in turn {number} of {key}, which {TURN[name].refused}')


def loss_weight(fields: dict[str, Any], place: str, row: bool = False) -> float | None:
    """Weight in the loss that a turn's (or with ``row`` a whole row's) keys ask for, None where they do not say."""
    found: dict[str, float] = {}
    for key in ("weight", "train", "loss") if row else (*WEIGHTS, *MASKS):
        value = fields.get(key)
        if missing(value) or (row and key != "weight" and not isinstance(value, bool)):
            continue
        number = _number(value)
        if number is None or (key in MASKS and number not in (0, 1)):
            raise Unfit(
                f"has {key}={value!r} in {place}, which is no weight of a loss",
                "Write true or false, or a number that is not negative"
                + (f", or leave the column out with data.ignore=[{key}]." if row else "."),
            )
        found[key] = 1 - number if key in MASKS else number
    if len(set(found.values())) > 1:
        raise Unfit(
            f"says {' and '.join(f'{key}={fields[key]!r}' for key in found)} in {place}: one contradicts another"
        )
    return next(iter(found.values()), None)


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        value = {"true": 1, "false": 0}.get(value.strip().lower(), value)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0 <= number < float("inf") else None
