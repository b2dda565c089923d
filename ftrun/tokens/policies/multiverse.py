"""Reasoning in parallel paths."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, takewhile
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ftrun.errors import ComponentError, DataError
from ftrun.registry import register
from ftrun.tokens.base import TokenPolicy

if TYPE_CHECKING:
    from ftrun.data.batches import Batch
    from ftrun.data.tokens import Sequence, TokenTable
    from ftrun.training.context import Context

TAG = re.compile(r"<(/?)(Parallel|Goal|Outline|Path|Conclusion)>")
PARENTS = {
    "Parallel": ("", "Path", "Conclusion"),
    "Goal": ("Parallel",),
    "Outline": ("Goal",),
    "Path": ("Parallel",),
    "Conclusion": ("Parallel",),
}
POSITION = "parallel_position"  # remembered of every token


class MalformedError(ValueError):
    """Tags that do not nest, in words."""


@dataclass(frozen=True)
class Path:
    """One path of a block; where it starts and ends counts characters of a text, or tokens of a sequence."""

    block: int  # in the sequence, from 1
    number: int  # in its block, from 1
    depth: int  # 1, or more for a block inside a path
    start: int
    end: int


@register("tokens", "multiverse")
@dataclass
class Multiverse(TokenPolicy):
    """Paths of a reasoning that do not see each other (Yang et al., 2025, arXiv:2506.09991).

    Answers hold, as plain text, <Parallel> <Goal> <Outline>1: ..</Outline> .. </Goal> <Path>1: ..</Path> <Path>2:
    ..</Path> <Conclusion> .. </Conclusion> </Parallel>, once, repeated or nested. The tokens of a path do not see those
    of its siblings; all paths of a block start at the same position, and what follows goes on after the longest. The
    first token after a path is no target: a decoder that runs the paths side by side writes it by itself. Answers that
    are not trained are ordinary context.

    Such a decoder is not part of ftrun. Its generation and its held-out loss are ordinary: the model writes and reads
    the paths one after the other, each sees those before and stands behind them. Unless ``learn_borders``, nothing has
    taught the model what to write after a path. Rows without tags train as ever.
    """

    learn_borders: bool = False  # also learn the first token after a path, for ordinary generation
    malformed: Literal["error", "plain"] = "error"  # rows whose tags do not nest: refuse, or train as ordinary text

    static: ClassVar[bool] = True
    remembers: ClassVar[bool] = True
    arranges: ClassVar[bool] = True

    def precompute(self, table: TokenTable, ctx: Context) -> tuple[np.ndarray, np.ndarray]:
        """No scores, and no weight for the first token after each path. Raises DataError for tags that do not nest."""
        if ctx.bundle is None:
            raise ComponentError("multiverse finds tags in tokens, and no tokenizer is loaded")
        reader = TagReader(ctx.bundle.tokenizer)
        self._paths: list[list[Path]] = []  # of every sequence; `remember` is asked next
        weights, broken = np.array(table.loss_weight), {}
        for index in range(len(table.record)):
            sequence = table.sequence(index)
            try:
                self._paths.append(list(reader.paths(sequence)))
            except MalformedError as error:
                broken[sequence.record] = str(error)
                self._paths.append([])
            if not self.learn_borders:
                ends = [path.end for path in self._paths[-1] if path.end < len(sequence.input_ids)]
                weights[table.offsets[index] + np.array(ends, int)] = 0
        self._tell(broken, ctx)
        return np.full(len(weights), np.nan), weights

    def remember(self, table: TokenTable, ctx: Context) -> dict[str, np.ndarray]:
        """The position of every token of a row with paths, and block and path for every depth; NaN for the others."""
        depth = max((path.depth for paths in self._paths for path in paths), default=0)
        names = [POSITION, *(name for level in range(1, depth + 1) for name in level_names(level))]
        found = {name: np.full(len(table.input_ids), np.nan, np.float32) for name in names if depth}
        for paths, start, end in zip(self._paths, table.offsets[:-1], table.offsets[1:], strict=True):
            if paths:
                found[POSITION][start:end] = positions(int(end - start), paths)
            for path in paths:
                block, number = level_names(path.depth)
                found[block][start + path.start : start + path.end] = path.block
                found[number][start + path.start : start + path.end] = path.number
        return found

    def arrange(self, batch: Batch, seed: tuple[int, int], progress: float) -> Batch:
        position = batch.remembered.get(POSITION)
        if position is None or position.isnan().all():
            return batch
        seen = (batch.sequence[:, :, None] == batch.sequence[:, None, :]).tril()
        for block, path in levels(batch):
            # a NaN equals nothing: tokens outside of paths see all, and are seen by all
            siblings = (block[:, :, None] == block[:, None, :]) & (path[:, :, None] != path[:, None, :])
            seen &= ~siblings
        position_ids = torch.where(position.isnan(), batch.position_ids, position.nan_to_num().long())
        return replace(batch, position_ids=position_ids, attention=seen)

    def _tell(self, broken: dict[int, str], ctx: Context) -> None:
        """Say how many rows have blocks, and refuse or count those whose tags do not nest."""
        if broken:
            row, words = next(iter(broken.items()))
            what = f"the tags of {len(broken)} of {len(self._paths)} rows do not nest"
            if self.malformed == "error":
                raise DataError(
                    what,
                    f"row {row}: {words}",
                    "Repair these rows, or train them as ordinary text with tokens.malformed=plain.",
                )
            ctx.report.warn(f"{what}; they train as ordinary text. Row {row}: {words}")
        with_blocks = sum(bool(paths) for paths in self._paths)
        if with_blocks:
            ctx.report.note(f"{with_blocks} of {len(self._paths)} rows have parallel paths")
            if not self.learn_borders:
                ctx.report.note(
                    "what to write after a path is not learned: `ftrun generate` and evaluation, which write path after "
                    "path, want tokens.learn_borders=true"
                )
        else:
            ctx.report.warn("no answer has a <Parallel> block with paths: this is plain fine-tuning")


class TagReader:
    """Finds paths in tokens: the ids of a tag depend on the tokenizer and on what stands around it, its text does not."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.texts: dict[int, str] = {}  # of every id met so far

    def paths(self, sequence: Sequence) -> Iterator[Path]:
        """The paths of all trained answers, outer ones before inner ones. Raises MalformedError for tags that do not nest."""
        blocks = 0
        for start, end in trained_spans(sequence.loss_weight):
            texts = [self._text(token) for token in sequence.input_ids[start:end].tolist()]
            found = paths_in("".join(texts))
            owner = key_characters(texts)
            for path in found:
                first, last = np.searchsorted(owner, [path.start, path.end])
                yield replace(path, block=blocks + path.block, start=start + int(first), end=start + int(last))
            blocks += max((path.block for path in found), default=0)

    def _text(self, token: int) -> str:
        if token not in self.texts:
            self.texts[token] = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return self.texts[token]


def trained_spans(loss_weight: np.ndarray) -> list[tuple[int, int]]:
    """Start and end of every run of tokens with a weight."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(loss_weight) > 0, [0]])))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def key_characters(texts: list[str]) -> np.ndarray:
    """For every token the character that says where it belongs, (tokens,): its first that is no white space.

    So " <" begins the path whose tag it opens, and "><" ends the one that it closes.
    """
    starts = np.cumsum([0, *map(len, texts)])[:-1]
    blank = [len(text) - len(text.lstrip()) if text.strip() else 0 for text in texts]
    return np.maximum.accumulate(starts + np.array(blank, int)) if texts else starts


def paths_in(text: str) -> list[Path]:
    """The paths of a text by the order in which they start; white space after a path belongs to it.

    Raises MalformedError where tags do not nest, or something stands between two paths of a block.
    """
    open_tags: list[tuple[str, int, int]] = []  # name, start, block that it belongs to
    ends: dict[int, list[int]] = {}  # of the closed paths of every block
    found: list[Path] = []
    for tag in TAG.finditer(text):
        name = tag[2]
        around = open_tags[-1] if open_tags else ("", 0, 0)
        if not tag[1]:
            if around[0] not in PARENTS[name]:
                raise MalformedError(f"<{name}> stands in <{around[0]}>" if around[0] else f"<{name}> stands alone")
            block = len(ends) + 1 if name == "Parallel" else around[2]
            siblings = ends.setdefault(block, [])
            if name == "Path" and siblings and siblings[-1] != tag.start():
                raise MalformedError("something other than white space stands between two paths")
            open_tags.append((name, tag.start(), block))
            continue
        if around[0] != name:
            raise MalformedError(f"</{name}> closes " + (f"<{around[0]}>" if around[0] else "nothing"))
        open_tags.pop()
        if name == "Path":
            _, start, block = around
            end = tag.end() + len(text) - tag.end() - len(text[tag.end() :].lstrip())
            ends[block].append(end)
            depth = 1 + sum(outer == "Path" for outer, _, _ in open_tags)
            found.append(Path(block, len(ends[block]), depth, start, end))
    if open_tags:
        raise MalformedError(f"<{open_tags[-1][0]}> is never closed")
    return sorted(found, key=lambda path: path.start)


def positions(length: int, paths: list[Path]) -> np.ndarray:
    """Positions of the tokens of a sequence: each path starts where its block's first does, (length,)."""
    found = np.empty(length, np.int64)
    starts, reach = {}, {}  # by block: where its paths start, and how far the longest got
    waiting, inside = list(reversed(paths)), []
    at = 0
    for token in range(length):
        while inside and inside[-1].end <= token:
            block = inside.pop().block
            at = reach[block] = max(reach.get(block, 0), at)
        while waiting and waiting[-1].start == token:
            inside.append(waiting.pop())
            at = starts.setdefault(inside[-1].block, at)
        found[token] = at
        at += 1
    return found


def level_names(depth: int) -> tuple[str, str]:
    """Names under which block and path of this depth are remembered."""
    return f"block_{depth}", f"path_{depth}"


def levels(batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Block and path of every token, (rows, time) each, depth by depth."""
    named = (level_names(depth) for depth in count(1))
    for block, path in takewhile(lambda names: names[0] in batch.remembered, named):
        yield batch.remembered[block], batch.remembered[path]
