"""Reasoning tokens told from boilerplate by shuffled answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import ConfigError, DataError
from ftrun.registry import register
from ftrun.tokens.base import TokenPolicy
from ftrun.tokens.reference import drawn_rows, losses_after, own_scoring, short_training

if TYPE_CHECKING:
    from ftrun.data.batches import Batch
    from ftrun.training.context import Context
    from ftrun.training.view import StepView

DIFFERENCE = "shad_minus_base"  # remembered: above 0 reasoning, else boilerplate
FEW_ROWS = 100  # of which little can be learned
BATCH_SIZE = 16  # of the training on shuffled rows


@register("tokens", "rft_shad")
@dataclass
class RftShad(TokenPolicy):
    """Give reasoning tokens more weight than boilerplate while they are harder (Ye et al., 2025, arXiv:2412.14780).

    A copy of the model, the SHAD model, learns a few rows whose responses were dealt to other prompts. What it then
    predicts better than the base, nll_shad - nll_base <= 0, can be said without the right prompt: boilerplate; the other
    response tokens are reasoning. With L_r and L_b the mean loss of each class in a sample,
    w_r = exp(L_r / tau) / (exp(L_r / tau) + exp(L_b / tau)) and w_b = 1 - w_r, the sample's loss is
    w_b L_b + w_r L_r; a step's is the mean over its samples. A sample of one class only has that class's mean.
    """

    tau: float = 3.0  # temperature of the two weights; the paper finds 1 / tau between 0.2 and 0.5 good
    shuffled_rows: float = 0.01  # share of the rows that the SHAD model learns, two at least
    shad_epochs: int = 1  # passes over them
    shad_learning_rate: float = 2e-4  # peak of that training
    shad_r: int = 16  # rank of the adapters that learn them

    needs: ClassVar[dict[str, str]] = {"token_loss": "weighs classes of tokens"}
    remembers: ClassVar[bool] = True
    dynamic: ClassVar[bool] = True
    whole_step: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("tau", "shad_epochs", "shad_learning_rate", "shad_r"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"tokens.{name} must be above 0", f"tokens.{name}={getattr(self, name)}")
        if not 0 < self.shuffled_rows <= 1:
            raise ConfigError(
                f"tokens.shuffled_rows is a share above 0 and up to 1, not {self.shuffled_rows}",
                f"tokens.shuffled_rows={self.shuffled_rows}",
            )

    def remember(self, table: TokenTable, ctx: Context) -> dict[str, np.ndarray]:
        """Loss under the SHAD model minus loss under the base of every trained token."""
        drawn = drawn_rows(with_prompts(table), self.shuffled_rows, ctx.seed, least=2)
        rows, cut = shuffled(drawn, ctx.seed, int(np.max(table.lengths)))
        if len(rows) < FEW_ROWS:
            ctx.report.warn(
                f"the SHAD model learns {len(rows)} shuffled rows: so few may not tell boilerplate from reasoning. "
                "Raise tokens.shuffled_rows or tokens.shad_epochs"
            )
        if cut:
            ctx.report.note(f"{cut} of {len(rows)} shuffled responses are cut at the longest row's length")
        base = own_scoring(ctx)
        lora = {"r": self.shad_r, "lora_alpha": 2.0 * self.shad_r, "target_modules": "all-linear"}
        training = short_training(len(rows), self.shad_epochs, self.shad_learning_rate, BATCH_SIZE, lora)
        shad = losses_after(training, rows, table, base, ctx, f"train the SHAD model on {len(rows):,} shuffled rows")
        difference = shad - base.token_nll(table, "score with the model")
        base.discard()
        known = difference[~np.isnan(difference)]
        ctx.report.note(
            f"{int((known > 0).sum())} of {len(known)} trained tokens are reasoning, the others boilerplate"
        )
        return {DIFFERENCE: difference}

    def statistic(self, view: StepView) -> Tensor:
        """Trained tokens of a micro-batch, and sequences that have some, (2,)."""
        tokens = torch.bincount(view.batch.target_sequence, minlength=view.batch.sequences)
        return torch.stack([tokens.sum(), (tokens > 0).sum()]).float()

    def weigh(self, view: StepView) -> Tensor:
        """Factors that make the objective's mean over tokens the mean over samples of w_b L_b + w_r L_r."""
        assert view.step_statistics is not None
        tokens, samples = view.step_statistics.view(-1, 2).sum(dim=0).tolist()
        shares = self.shares(view.token_nll.detach(), view.batch)
        return shares * (tokens / max(samples, 1))

    def shares(self, nll: Tensor, batch: Batch) -> Tensor:
        """Of each trained token in the loss of its sample: w of its class over the tokens of that class, (tokens,)."""
        reasoning = (batch.remembered_targets(DIFFERENCE) > 0).long()
        group = 2 * batch.target_sequence + reasoning  # class of a sample
        zeros = torch.zeros(2 * batch.sequences, dtype=nll.dtype, device=nll.device)
        counts = zeros.index_add(0, group, torch.ones_like(nll))
        means = zeros.index_add(0, group, nll) / counts.clamp(min=1)  # L_b, L_r of each sample in turn
        weights = torch.softmax((means / self.tau).masked_fill(counts == 0, -torch.inf).view(-1, 2), dim=1)  # w_b, w_r
        return weights.flatten()[group] / counts[group]


def with_prompts(table: TokenTable) -> TokenTable:
    """The rows that have a prompt before their first trained token. Raises DataError when there is none."""
    trained = np.asarray(table.loss_weight) > 0
    asked = np.flatnonzero((table.lengths > 2) & ~table.continues)
    first = table.offsets[asked]
    asked = asked[~(trained[first] | trained[first + 1])]
    if not len(asked):
        raise DataError(
            "rft_shad deals responses to other prompts, and no row has a prompt",
            "data.path",
            "Use rows with prompts and responses, and data.train_on=responses.",
        )
    return table.rows(asked)


def shuffled(table: TokenTable, seed: int, longest: int) -> tuple[TokenTable, int]:
    """Each row's prompt with what follows the prompt of another row, and how many were cut at ``longest`` tokens.

    The rows stand in a circle in random order and each takes from the next, so no response keeps its prompt. A prompt
    ends before the first trained token.
    """
    circle = np.random.default_rng([seed, len(table)]).permutation(len(table))
    made, cut = [], 0
    for own, other in zip(circle.tolist(), np.roll(circle, -1).tolist(), strict=True):
        prompt, response = table.sequence(own), table.sequence(other)
        start, end = (int((np.asarray(item.loss_weight) > 0).argmax()) for item in (prompt, response))
        ids = np.concatenate([prompt.input_ids[:start], response.input_ids[end:]])
        weight = np.concatenate([prompt.loss_weight[:start], response.loss_weight[end:]])
        cut += len(ids) > longest
        made.append(Sequence(ids[:longest], weight[:longest], prompt.record))
    return TokenTable.from_sequences(made), cut
