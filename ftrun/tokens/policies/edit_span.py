"""Edits as the target, instead of the whole edited text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ftrun.data import edits
from ftrun.registry import register
from ftrun.tokens.base import TokenPolicy, edited_row
from ftrun.tokens.edited import EDIT_SOURCE, EDIT_TARGET

if TYPE_CHECKING:
    from ftrun.data.records import Record
    from ftrun.training.context import Context


@register("tokens", "edit_span")
@dataclass
class EditSpan(TokenPolicy):
    """The model writes what changes in a text, not the text (Kaneko and Okazaki, 2023, arXiv:2305.11862).

    Source and response are aligned word by word (Levenshtein); each stretch that differs is one edit, and the response
    becomes a line ``start end new words`` for each of them: positions count the words of the source from 0, ``end``
    excluded; start = end inserts, the word None deletes, and None alone leaves the text as it is. Held-out rows are
    turned too; eval=edit_span applies what the model writes.
    """

    source: str | None = "input"  # column with the text that is edited; null: the whole last user turn

    edits: ClassVar[bool] = True
    edits_heldout: ClassVar[bool] = True

    def edit(self, records: Iterable[Record], ctx: Context) -> Iterator[dict[str, Any]]:
        without = characters = written = 0
        for record in records:
            source = self.text_of(record)
            if source is None:
                without += 1
                continue
            answer = record.messages[-1]
            lines = edits.write(edits.extract(source, answer.content))
            characters, written = characters + len(answer.content), written + len(lines)
            row = edited_row(record, [*record.messages[:-1], replace(answer, content=lines)])
            yield row | {EDIT_SOURCE: source, EDIT_TARGET: answer.content}
        if without:
            where = "last user turn" if self.source is None else f'column "{self.source}"'
            ctx.report.warn(f"{without} rows are left out: no text to edit in their {where}")
        if characters:
            ctx.report.note(f"the edits are {written / characters:.0%} as long as the edited texts, in characters")

    def text_of(self, record: Record) -> str | None:
        """The text that the record's response is an edited form of."""
        if self.source is not None:
            text = record.fields.get(self.source)
            return text if isinstance(text, str) and text.strip() else None
        asked = [message.content for message in record.prompt if message.role == "user"]
        return asked[-1] if asked else None
