"""Critical tokens: those that decide whether the model's own answer is right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from ftrun.data.answers import Check, check_of
from ftrun.data.records import Message, Record
from ftrun.data.turns import messages_of
from ftrun.errors import ConfigError, DataError
from ftrun.registry import register
from ftrun.tokens.base import TokenPolicy, edited_row
from ftrun.tokens.continuations import Continuations
from ftrun.tokens.edited import edited_rows

if TYPE_CHECKING:
    from ftrun.data.batches import Batch
    from ftrun.data.tokens import TokenTable
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context

LOGITS_AT_ONCE = 256  # positions


@dataclass
class Answer:
    """An answer of the model as it stands in the table."""

    ids: list[int]  # of the whole row
    first: int  # place of the first answer token in the row
    end: int  # place of the token that ends the turn; the row's length where it was cut off
    offset: int  # of the row in the table
    check: Check


@dataclass
class Tally:
    """What became of the positions."""

    answers: int
    positions: int  # answer tokens, the end of turn not counted
    tested: int
    critical: int = 0
    continuations: int = 0
    unfinished: int = 0  # continuations that did not end within max_new_tokens: wrong
    answers_without: int = 0  # answers without a critical token: left out


@register("tokens", "critical_token_ft")
@dataclass
class CriticalTokenFt(TokenPolicy):
    """Trains the tokens on which the model's own right answers hang (Ruan et al., 2025, arXiv:2510.10974).

    The model answers every question greedily; right answers replace those of the data. At each position t of an answer
    the most probable other tokens (2nd and 3rd) are put in place of ``y_t``, the answer is continued greedily and
    checked. ``c_t = 1`` if all of them end wrong, else 0; the loss is ``sum(c_t * nll_t) / sum(c_t)``. The token that
    ends the turn is not tested and counts as critical; an answer without another critical token is left out.
    """

    alternatives: int = 2  # other tokens tried at every position, the most probable ones
    max_new_tokens: int = 256  # longest answer, and longest continuation; what does not end by itself is wrong
    max_positions: int | None = None  # positions of each answer that are tested, evenly spread; null: all
    check: Literal["auto", "verifier", "last_number", "exact_match", "contains"] = "auto"  # as in eval=generation
    batch_tokens: int = 8192  # tokens of the beginnings that are continued at a time

    needs: ClassVar[dict[str, str]] = {"token_loss": "weighs single tokens of the loss"}
    edits: ClassVar[bool] = True
    eats: ClassVar[tuple[str, ...]] = ("sft", "prompts")
    edit_uses_model: ClassVar[bool] = True
    static: ClassVar[bool] = True
    drops_empty: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("alternatives", "max_new_tokens", "max_positions", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"tokens.{name} must be at least 1", f"tokens.{name}={value}")

    # ---- the model's own answers ----

    def edit(self, records: Iterable[Record], ctx: Context) -> Iterator[dict[str, Any]]:
        """The rows whose question the model answers rightly, with its own answer.

        Raises DataError for a row that cannot be checked.
        """
        writer = self._writer(ctx)
        asked: list[tuple[Record, Check, list[int]]] = []
        lost: Counter[str] = Counter()
        for record in records:
            where = f"row {record.id}"
            prompt = writer.renderer.prompt_ids(record, where)
            asked.append((record, check_of(record, self.check, where), prompt))
        ctx.report.note(f"{len(asked)} questions are answered greedily, with at most {self.max_new_tokens} tokens each")
        answers = writer.write([prompt for _, _, prompt in asked], "answer the questions")
        solved = 0
        for (record, check, prompt), ids in zip(asked, answers, strict=True):
            text = writer.text(ids)
            if not writer.fits(prompt):
                lost["leave no room for an answer in the context"] += 1
            elif not writer.ended(ids):
                lost["have an answer that does not end"] += 1
            elif not text or check.score(text) < 1:
                lost["are answered wrongly"] += 1
            else:
                solved += 1
                yield _row(record, check, text)
        reasons = "; ".join(f"{count} {reason}" for reason, count in lost.items())
        ctx.report.note(f"{solved} of {len(asked)} questions are solved" + (f"; left out: {reasons}" if lost else ""))

    # ---- the counterfactual test ----

    def precompute(self, table: TokenTable, ctx: Context) -> tuple[np.ndarray, np.ndarray]:
        """Score 1 for a critical token, 0 for one that was tested and is not, NaN for the others."""
        writer = self._writer(ctx)
        answers = _answers(table, writer, ctx)
        others = self._other_tokens(table, answers, writer)
        tests = [(answer, row, at) for row, answer in enumerate(answers) for at in self._tested(answer, writer)]
        if not tests:
            raise DataError(
                "critical_token_ft has no answer token to test",
                "selection/edited.jsonl",
                "Lower tokens.max_new_tokens if the answers leave no room for continuations in the context.",
            )
        tally = Tally(len(answers), sum(answer.end - answer.first for answer in answers), len(tests))
        self._say_cost(tests, writer)
        undecided = tests  # a right continuation settles a position: the next token is tried where all were wrong
        for rank in range(self.alternatives):
            begun = [[*answer.ids[:at], int(others[row][at - answer.first, rank])] for answer, row, at in undecided]
            title = f"try other token {rank + 1} of {self.alternatives}"
            whole = _finished(begun, writer, title)
            tally.continuations += len(undecided)
            tally.unfinished += sum(not writer.ended(ids) for ids in whole)
            undecided = [
                (answer, row, at)
                for (answer, row, at), ids in zip(undecided, whole, strict=True)
                if not (writer.ended(ids) and answer.check.score(writer.text(ids[answer.first :])) >= 1)
            ]
        scores, kept = np.full(len(table.input_ids), np.nan), np.zeros(len(table.input_ids), bool)
        scores[[answer.offset + at for answer, _, at in tests]] = 0
        for answer, _, at in undecided:
            scores[answer.offset + at] = kept[answer.offset + at] = 1
            if answer.end < len(answer.ids):
                kept[answer.offset + answer.end] = True
        tally.critical, tally.answers_without = len(undecided), len(answers) - len({row for _, row, _ in undecided})
        self._say_outcome(tally, ctx)
        writer.engine.discard()
        return scores, np.where(kept, table.loss_weight, 0).astype(np.float32)

    def _tested(self, answer: Answer, writer: Continuations) -> list[int]:
        """Places in the row that are tested: those after which a continuation has room in the context."""
        room = writer.bundle.context_length - self.max_new_tokens  # longest beginning, the other token included
        return [at for at in self._spread(answer) if at + 1 <= room]

    def _spread(self, answer: Answer) -> list[int]:
        count = answer.end - answer.first
        if self.max_positions is None or count <= self.max_positions:
            return list(range(answer.first, answer.end))
        return [answer.first + (2 * i + 1) * count // (2 * self.max_positions) for i in range(self.max_positions)]

    def _other_tokens(self, table: TokenTable, answers: list[Answer], writer: Continuations) -> list[np.ndarray]:
        """The most probable tokens but the one that is there, best first, (answer tokens, alternatives) a row."""
        asked = np.zeros(len(table.input_ids), np.float32)
        for answer in answers:
            asked[answer.offset + answer.first : answer.offset + answer.end] = 1

        def best(bundle: Bundle, batch: Batch) -> list[np.ndarray]:
            hidden = bundle.architecture.hidden_states(bundle.model, batch)[batch.predicting]
            head, found = bundle.architecture.head(bundle.model), []
            parts = zip(hidden.split(LOGITS_AT_ONCE), batch.target_ids.split(LOGITS_AT_ONCE), strict=True)
            for states, ids in parts:
                logits = head.logits(states).float().scatter(1, ids[:, None].long(), -torch.inf)
                found.append(logits.topk(self.alternatives, dim=1).indices)
            counts = torch.bincount(batch.target_sequence, minlength=batch.sequences).cpu().tolist()
            return [part.cpu().numpy() for part in torch.cat(found).split(counts)]

        name = f"others-{self.alternatives}"
        flat = writer.engine.measure(table.with_weights(asked), name, best, "find other tokens", packable=True)
        return [values.reshape(-1, self.alternatives).astype(np.int64) for values in flat]

    def _writer(self, ctx: Context) -> Continuations:
        return Continuations(ctx, self.max_new_tokens, self.batch_tokens)

    # ---- what people are told ----

    def _say_cost(self, tests: list[tuple[Answer, int, int]], writer: Continuations) -> None:
        rest = float(np.mean([answer.end - at for answer, _, at in tests]))
        minutes = writer.minutes([answer.ids[: at + 1] for answer, _, at in tests], rest)
        writer.ctx.report.note(
            f"{len(tests)} positions are tested: {len(tests)} to {self.alternatives * len(tests)} continuations, about "
            f"{minutes:.1f} to {self.alternatives * minutes:.1f} minutes if they are as long as what they replace, and "
            f"more where they run on to {self.max_new_tokens} tokens; tokens.max_positions bounds it"
        )

    def _say_outcome(self, tally: Tally, ctx: Context) -> None:
        ctx.facts["critical_tokens"] = asdict(tally)
        ctx.report.note(
            f"{tally.critical} of {tally.tested} tested tokens are critical ({tally.critical / tally.tested:.1%}); "
            f"{tally.positions - tally.tested} were not tested (tokens.max_positions, or no room in the context for "
            f"tokens.max_new_tokens more); {tally.continuations} continuations, "
            f"{tally.unfinished} of them unfinished and counted as wrong"
        )
        if tally.critical == 0:
            raise DataError(
                f"none of {tally.tested} tested tokens is critical: every answer survives a change anywhere",
                f"tokens.max_positions={self.max_positions}",
                "Test more positions, give harder questions, or lower tokens.alternatives.",
            )


def _finished(begun: list[list[int]], writer: Continuations, title: str) -> list[list[int]]:
    """The rows with their continuation; where the changed token is itself an end, nothing follows."""
    rests = iter(writer.write([ids for ids in begun if not writer.ended(ids)], title))
    return [ids if writer.ended(ids) else ids + next(rests) for ids in begun]


def _answers(table: TokenTable, writer: Continuations, ctx: Context) -> list[Answer]:
    """The answer of every row of the table, with its check, which selection/edited.jsonl holds."""
    rows = edited_rows(ctx)
    found = []
    for index in range(len(table)):
        number = int(table.record[index])
        row = rows[number]
        turns = messages_of(row)
        record = Record(number, "sft", turns, answer=row.get("answer"), verifier=row.get("verifier"), fields=row)
        ids = table.sequence(index).input_ids.tolist()
        first = len(writer.renderer.prompt_ids(record))
        ends = [at for at in range(first, len(ids)) if ids[at] == writer.renderer.end_of_turn]
        check = check_of(record, row["check"], f"row {number}")
        found.append(Answer(ids, first, ends[-1] if ends else len(ids), int(table.offsets[index]), check))
    return found


def _row(record: Record, check: Check, text: str) -> dict[str, Any]:
    """The row with the model's answer, and all that checking another one needs."""
    row = edited_row(record, [*record.prompt, Message("assistant", text)]) | {"check": check.metric}
    return row if check.metric == "verifier" else row | {"answer": check.gold}
