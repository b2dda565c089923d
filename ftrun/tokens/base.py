"""What a token policy is: which tokens are trained, and how much each weighs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy as np
    from torch import Tensor, nn

    from ftrun.data.batches import Batch
    from ftrun.data.records import Message, Record
    from ftrun.data.tokens import TokenTable
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context
    from ftrun.training.parts import Loop
    from ftrun.training.view import StepView


@dataclass
class TokenPolicy:
    """Base of token policies. A method overrides the one thing it is about.

    In the order in which a run comes to them: `edit` the rows, `precompute` weights or `remember` numbers of all
    tokens, `attach` parameters of its own, and in every step `arrange` a batch, `perturb` its embeddings and `weigh`
    its tokens.
    """

    needs: ClassVar[dict[str, str]] = {}
    lacks: ClassVar[dict[str, str]] = {}
    edits: ClassVar[bool] = False  # has `edit`
    eats: ClassVar[tuple[str, ...]] = ()  # kinds of rows that `edit` takes; none: the kind that the objective trains on
    edits_heldout: ClassVar[bool] = False  # the held-out rows are edited too: the model needs it at inference
    edit_uses_model: ClassVar[bool] = False  # `edit` finds the model in ``ctx.bundle``
    static: ClassVar[bool] = False  # has `precompute`
    drops_empty: ClassVar[bool] = False  # rows in which `precompute` leaves no weight are left out of training
    remembers: ClassVar[bool] = False  # has `remember`
    dynamic: ClassVar[bool] = False  # has `weigh`
    whole_step: ClassVar[bool] = False  # `weigh` needs statistics of the whole optimiser step: overrides `statistic`
    perturbs: ClassVar[bool] = False  # has `perturb`
    arranges: ClassVar[bool] = False  # has `arrange`
    packs: ClassVar[bool] = True  # rows may share a packed row

    def edit(self, records: Iterable[Record], ctx: Context) -> Iterator[dict[str, Any]]:
        """Rows to train on instead of these, as they would stand in a file: ``messages``, and whatever else they had.

        There may be more or fewer of them; ``row`` names the id that a row was made of. They end in
        selection/edited.jsonl. With ``edits_heldout`` the held-out rows come too: then ``records is ctx.heldout``.
        """
        raise NotImplementedError

    def edit_prompt(self, record: Record) -> Record:
        """A prompt as the trained model wants it, where it was trained on edited ones: what `ftrun generate` asks."""
        return record

    def precompute(self, table: TokenTable, ctx: Context) -> tuple[np.ndarray, np.ndarray]:
        """Scores and new loss weights of every token of the table, (tokens,) each; stored as selection/tokens.parquet.

        A score is NaN where the token has none (prompt tokens).
        """
        raise NotImplementedError

    def remember(self, table: TokenTable, ctx: Context) -> dict[str, np.ndarray]:
        """Numbers of every token of the table by name, (tokens,) each, that `weigh` finds as ``batch.remembered``.

        NaN where a token has none. They are stored in selection/tokens.parquet.
        """
        raise NotImplementedError

    def attach(self, bundle: Bundle, ctx: Context) -> nn.Module | None:
        """A module whose parameters train with the model and lie in its checkpoints, but not in what is saved."""
        return None

    def order(self, table: TokenTable) -> np.ndarray | None:
        """Which part of an epoch each row belongs to, (rows,) integers: lower ones come first; None: all rows are mixed."""
        return None

    def before_step(self, step: int, trainer: Loop) -> None:
        """Called before optimiser step ``step`` (from 0) on every process; may give ``trainer.table`` other weights.

        A resumed run calls it first with the step that it goes on from.
        """

    def watched_layer(self) -> int | None:
        """Decoder layer whose attention `weigh` asks for by ``view.attention_to``, counted from the end where negative."""
        return None

    def input_lengths(self, table: TokenTable) -> np.ndarray:
        """Inputs of every sequence as `arrange` leaves it, (sequences,): what micro-batches and memory are counted by."""
        return table.lengths

    def arrange(self, batch: Batch, seed: tuple[int, int], progress: float) -> Batch:
        """The batch as the model should see it: other inputs, positions or attention; ``batch.targets`` say what it learns.

        ``seed`` as in `perturb`; ``progress`` is the share of the optimiser steps that are done.
        """
        raise NotImplementedError

    def statistic(self, view: StepView) -> Tensor:
        """Numbers of one micro-batch, (n,), that all micro-batches and ranks of the step put together for `weigh`."""
        raise NotImplementedError

    def weigh(self, view: StepView) -> Tensor:
        """Factors on the loss weights of the trained tokens, (tokens,), without gradient.

        ``view.step_statistics`` holds what `statistic` gave for the whole step.
        """
        raise NotImplementedError

    def perturb(self, embeddings: Tensor, batch: Batch, seed: tuple[int, int]) -> Tensor:
        """Token embeddings (rows, time, width) as the training forward pass sees them.

        ``seed`` is that of the run and the number of the optimiser step.
        """
        raise NotImplementedError


def edited_row(record: Record, messages: Iterable[Message]) -> dict[str, Any]:
    """A row for `TokenPolicy.edit`: the record with this conversation instead of its own, its other columns unchanged."""
    named = {"answer": record.answer, "verifier": record.verifier}
    offered = {"tools": list(record.tools)} if record.tools else {}  # whatever their column is called
    folded = ("chosen", "rejected", "weight", "train", "loss")  # the turns say it now
    further = {key: value for key, value in record.fields.items() if key not in (*folded, *named)}
    turns = [message.turn() for message in messages]
    known = {key: value for key, value in named.items() if value is not None}
    return {**further, **known, **offered, "messages": turns, "row": record.id}
