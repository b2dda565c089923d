"""Weighs the tokens in which a right program differs from a wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ftrun.data.batches import collate, length_sorted
from ftrun.data.edits import aligned
from ftrun.data.records import Record
from ftrun.data.render import Renderer
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.data.turns import messages_of
from ftrun.errors import ConfigError, DataError
from ftrun.models.head import token_nll
from ftrun.registry import register
from ftrun.tokens.base import TokenPolicy, edited_row
from ftrun.tokens.edited import edited_rows, token_ends
from ftrun.training.view import StepView

if TYPE_CHECKING:
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context

LINE, TOKEN = "line", "token"


@dataclass
class Marks:
    """Which characters of a program the other one does not have."""

    line: np.ndarray  # (characters,) bool: in a changed line
    token: np.ndarray  # (characters,) bool: changed themselves; a part of ``line``


@register("tokens", "fait")
@dataclass
class Fait(TokenPolicy):
    """Fault-aware fine-tuning (Fan et al., 2025, arXiv:2503.16913). Approximate: the paper's weight is not known.

    Rows have, beside the right answer, a similar wrong one in the column ``wrong``. Lines that only one of the two
    has are marked in both; in lines that take each other's place, the characters that change. Tokens are trained on
    the right answer alone, with weight ``w = clip(1 + alpha_line * line * r + alpha_token * token * r, 1, w_max)``.
    ``r`` is the mean loss of the marked tokens of the right answer over that of the wrong answer's, both under the
    model being trained: large while it still prefers the fault. ``line`` and ``token`` are 0 or 1.
    """

    needs: ClassVar[dict[str, str]] = {"token_loss": "weighs the loss of every token"}

    wrong: str = "wrong"  # column with the wrong answer
    alpha_line: float = 0.5  # weight of a changed line
    alpha_token: float = 0.5  # further weight of the changed tokens in it
    w_max: float = 3.0  # largest weight
    comments: list[str] = field(default_factory=lambda: ["#", "//"])  # lines that begin like this are never marked

    edits: ClassVar[bool] = True
    remembers: ClassVar[bool] = True
    dynamic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.alpha_line < 0 or self.alpha_token < 0 or self.w_max < 1:
            raise ConfigError(
                "tokens.alpha_line and tokens.alpha_token are at least 0, tokens.w_max at least 1",
                f"tokens.alpha_line={self.alpha_line:g} tokens.alpha_token={self.alpha_token:g} tokens.w_max={self.w_max:g}",
            )

    def edit(self, records: Iterable[Record], ctx: Context) -> Iterator[dict[str, Any]]:
        """The rows as they are, as conversations; the wrong answer stays beside the right one."""
        for record in records:
            wrong = record.fields.get(self.wrong)
            if not isinstance(wrong, str) or not wrong.strip() or not record.response.strip():
                raise DataError(
                    f'row {record.id} has no wrong answer beside the right one: tokens=fait reads it from the column "{self.wrong}"',
                    f"data.path={ctx.settings.data.path}",
                    "Complete or remove the row, or name the column with tokens.wrong.",
                )
            yield {**edited_row(record, record.messages), "wrong": wrong}

    def remember(self, table: TokenTable, ctx: Context) -> dict[str, np.ndarray]:
        """``line`` and ``token``: 1 for the marked tokens of the right answers, 0 for the others, (tokens,)."""
        assert ctx.bundle is not None
        renderer, rows = Renderer(ctx.bundle.tokenizer), edited_rows(ctx)
        found = {name: np.zeros(len(table.input_ids)) for name in (LINE, TOKEN)}
        cut = 0
        for index in range(len(table)):
            right, wrong = _both(rows[int(table.record[index])], int(table.record[index]))
            marks, _ = differences(right.response, wrong.response, tuple(self.comments))
            (whole,), start = renderer.sequences(right), int(table.offsets[index])
            length = int(table.lengths[index])
            cut += len(whole.input_ids) > length
            for name, mask in ((LINE, marks.line), (TOKEN, marks.token)):
                found[name][start : start + length] = marked_tokens(renderer, right, whole, mask)[:length]
        self._report(table, found[LINE], cut, ctx)
        return found

    def attach(self, bundle: Bundle, ctx: Context) -> None:
        """Brings no parameters; the wrong answers are tokenised, their marked tokens asked for."""
        assert ctx.train_tokens is not None
        renderer, rows = Renderer(bundle.tokenizer), edited_rows(ctx)
        made = []
        for record in ctx.train_tokens.record.tolist():
            right, wrong = _both(rows[record], record)
            _, marks = differences(right.response, wrong.response, tuple(self.comments))
            (whole,) = renderer.sequences(wrong)
            asked = marked_tokens(renderer, wrong, whole, marks.line | marks.token).astype(np.float32)
            made.append(Sequence(whole.input_ids[: bundle.context_length], asked[: bundle.context_length], record))
        self._wrong = TokenTable.from_sequences(made)
        self._asked = self._wrong.trained_counts() > 0

    def weigh(self, view: StepView) -> Tensor:
        line, token = (view.batch.remembered_targets(name) for name in (LINE, TOKEN))
        r = self._ratio(view, line + token > 0)[view.batch.target_sequence]
        w = 1 + self.alpha_line * line * r + self.alpha_token * token * r
        return w.clamp(1, self.w_max)

    def _ratio(self, view: StepView, marked: Tensor) -> Tensor:
        """r of every sequence, (sequences,); 1 where one of the two programs has no marked token."""
        nll = view.token_nll.detach()
        ours = _mean(nll[marked], view.batch.target_sequence[marked], view.batch.sequences)
        theirs = self._wrong_nll(view)
        ratio = ours / theirs
        return torch.where(ratio.isfinite(), ratio, torch.ones_like(ratio))

    def _wrong_nll(self, view: StepView) -> Tensor:
        """Mean loss of the marked tokens of every wrong answer, (sequences,), NaN where there is none."""
        mine = view.batch.table_index.cpu().numpy()
        places = np.flatnonzero(self._asked[mine])  # in the batch
        found = torch.full((view.batch.sequences,), torch.nan, device=view.batch.input_ids.device)
        architecture, training = view.architecture, view.model.training
        view.model.eval()
        try:
            # cut anew: a wrong answer may be longer than the batch that its right one was put into
            for part in length_sorted(self._wrong.lengths[mine[places]], view.batch.input_ids.numel()):
                batch = collate(self._wrong, [[index] for index in mine[places[part]].tolist()], 0).to(found.device)
                states = architecture.hidden_states(view.model, batch)[batch.predicting]
                nll = token_nll(states, architecture.head(view.model), batch.target_ids)
                found[places[part].tolist()] = _mean(nll, batch.target_sequence, batch.sequences).to(found.dtype)
        finally:
            view.model.train(training)
        return found

    def _report(self, table: TokenTable, line: np.ndarray, cut: int, ctx: Context) -> None:
        rows = np.add.reduceat(line, table.offsets[:-1]) > 0 if len(table) else np.zeros(0, bool)
        ctx.report.note(
            f"{int(line.sum()):,} tokens in lines that differ from the wrong answers, in {int(rows.sum()):,} rows"
        )
        if not rows.all():
            ctx.report.warn(
                f"{int((~rows).sum()):,} rows do not differ from their wrong answer in a line: plain training"
            )
        if cut:
            ctx.report.warn(
                f"{cut:,} right answers were cut at data.max_length: what they differ in later is not weighed"
            )


def differences(right: str, wrong: str, comments: tuple[str, ...] = ()) -> tuple[Marks, Marks]:
    """What differs in each of two programs. Lines are equal if only white space inside or behind them differs."""
    ours, theirs = right.splitlines(keepends=True), wrong.splitlines(keepends=True)
    marks = tuple(Marks(np.zeros(len(text), bool), np.zeros(len(text), bool)) for text in (right, wrong))
    starts = [np.cumsum([0, *map(len, lines)]) for lines in (ours, theirs)]
    keys = [[_key(line, comments) for line in lines] for lines in (ours, theirs)]
    matcher = difflib.SequenceMatcher(None, *keys, autojunk=False)
    for kind, first, last, other_first, other_last in matcher.get_opcodes():
        if kind == "equal":
            continue
        for side, (begin, end) in enumerate(((first, last), (other_first, other_last))):
            for number in range(begin, end):
                if keys[side][number]:
                    start, line = starts[side][number], (ours, theirs)[side][number]
                    marks[side].line[start : start + len(line.rstrip())] = True
        pairs = min(last - first, other_last - other_first)
        for number in range(pairs):
            changed = changed_characters(ours[first + number], theirs[other_first + number])
            for side, (at, own) in enumerate(zip((first, other_first), changed, strict=True)):
                begin = starts[side][at + number]
                marks[side].token[begin : begin + len(own)] = own
        for side, (begin, end) in enumerate(((first + pairs, last), (other_first + pairs, other_last))):
            marks[side].token[starts[side][begin] : starts[side][end]] = True  # a line without a partner: all of it
    for side in marks:
        side.token &= side.line
    return marks[0], marks[1]


def changed_characters(one: str, two: str) -> tuple[np.ndarray, np.ndarray]:
    """Characters of each text outside a smallest edit of one into the other (Levenshtein), (characters,) bool each."""
    changed = np.ones(len(one), bool), np.ones(len(two), bool)
    for i, j in aligned(one, two):
        changed[0][i] = changed[1][j] = False
    return changed


def _both(row: dict[str, Any], id: int) -> tuple[Record, Record]:
    """The conversation with the right answer, and with the wrong one."""
    *before, answer = messages_of(row)
    return tuple(Record(id, "sft", (*before, replace(answer, content=text))) for text in (answer.content, row["wrong"]))  # type: ignore[return-value]


def marked_tokens(renderer: Renderer, record: Record, sequence: Sequence, marks: np.ndarray) -> np.ndarray:
    """Tokens of the sequence that hold a marked character of the record's response, (tokens,) bool.

    Raises DataError where the chat template or the tokenizer changes the response.
    """
    found = np.zeros(len(sequence.input_ids), bool)
    prompt = len(renderer.prompt_ids(record))
    ids = sequence.input_ids[prompt:]
    text = renderer.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    ends = token_ends(renderer.tokenizer, text, ids)
    body = record.response.strip()
    at = text.find(body)
    if ends is None or at < 0:
        raise DataError(
            f"row {record.id}: the chat template or the tokenizer changes the answer, so its characters cannot be found in it",
            "tokens=fait",
            "Use another template with model.template=chatml, or another model.",
        )
    offset = at - record.response.index(body)  # of the response in the rendered text
    count = np.cumsum(np.concatenate([[0], marks]))  # marked characters before each
    limits = np.clip(np.concatenate([[0], np.maximum.accumulate(ends)]) - offset, 0, len(marks))
    found[prompt:] = np.diff(count[limits]) > 0
    return found & (sequence.loss_weight > 0)


def _key(line: str, comments: tuple[str, ...]) -> str:
    """A line as it is compared: its indentation, then its words; empty for blank lines and comments."""
    words = line.split()
    if not words or line.lstrip().startswith(comments):
        return ""
    return line[: len(line) - len(line.lstrip())].expandtabs() + " ".join(words)


def _mean(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Means by group, (groups,), NaN for an empty one."""
    zeros = torch.zeros(groups, dtype=values.dtype, device=values.device)
    return zeros.index_add(0, group, values) / zeros.index_add(0, group, torch.ones_like(values))
