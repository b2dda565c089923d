"""Sample and token pruning at once, inside every optimiser step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.tokens.base import TokenPolicy
from ftrun.tokens.step_ranking import POSITION_BITS, ranks, target_positions, token_keys
from ftrun.training.view import StepView

WIDEST_LEVEL = 0.49  # the bisection moves the quantile level between 0 and this
TRIES, TOLERANCE = 10, 0.01  # levels tried; share of samples that is near enough


@dataclass
class Step:
    """What is known of a whole optimiser step, by rising place in the data; copies of a row are one sample."""

    place: np.ndarray  # (samples,) in the data
    copies: np.ndarray  # (samples,) how often it is in the step
    ppl: np.ndarray  # (samples,) exp of the mean loss of the response
    entropy: np.ndarray  # (samples,) mean entropy of the response's predictions
    trained: np.ndarray  # (samples,) response tokens
    tokens: np.ndarray  # (samples,) tokens that something predicts, those of the prompt included
    token_key: np.ndarray  # (tokens,) place and position of response tokens; empty but for token_budget=batch
    token_score: np.ndarray  # (tokens,)

    @classmethod
    def of(cls, lines: np.ndarray) -> Step:
        """From the lines of `QTuning.statistic`, (lines, 6)."""
        samples, tokens = lines[lines[:, 1] == 0], lines[lines[:, 1] > 0]
        place, first, copies = np.unique(samples[:, 0].astype(np.int64), return_index=True, return_counts=True)
        _, _, ppl, entropy, trained, length = samples[first].T
        keys, known = np.unique(token_keys(tokens[:, 0], tokens[:, 1]), return_index=True)
        return cls(place, copies, ppl, entropy, trained, length, keys, tokens[known, 2])


@register("tokens", "q_tuning")
@dataclass
class QTuning(TokenPolicy):
    """Keeps the samples worth training, and the sound tokens of doubtful ones (Wang et al., 2025, arXiv:2509.23873).

    Each sample of an optimiser step has PPL, exp of the mean loss of its response, and Ent, the mean entropy of its
    predictions. Q2, PPL high and Ent low: sure of something wrong, kept with its tokens pruned. Q4, PPL low and Ent
    high: right but unsure, kept whole. The others are dropped. High and low are quantiles of the step, whose level is
    bisected until ``r_sample`` of the samples are kept; what is then missing is filled by the largest |PPL - Ent|,
    both scaled to 0..1. A token of Q2 scores (1 - smoothing) PPL_i + smoothing (PPL_{i-1} + PPL_{i+1}), PPL_i = exp of
    its loss; the highest are dropped. The loss is divided by the tokens that are left.
    """

    r_sample: float = 0.5  # share of the samples of a step that is kept
    r_token: float = 0.7  # share of the response tokens that a pruned sample keeps
    smoothing: float = 0.5  # weight of the two neighbours in the score of a token (lambda)
    keep: Literal["low", "high"] = "low"  # which scores stay; high: the reversed ablation of the paper
    token_budget: Literal["per_sample", "batch"] = "per_sample"  # batch: one ranking a step, as in the authors' code
    edge: Literal["zero", "copy"] = "zero"  # neighbour without loss: 0, 1 if it is a prompt token; copy: the other one

    needs: ClassVar[dict[str, str]] = {"token_loss": "prunes a loss that is a mean over tokens"}
    dynamic: ClassVar[bool] = True
    whole_step: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, share in (("r_sample", self.r_sample), ("r_token", self.r_token)):
            if not 0 < share <= 1:
                raise ConfigError(
                    f"tokens.{name} is a share above 0 and up to 1, not {share}", f"tokens.{name}={share}"
                )
        if not 0 <= self.smoothing <= 1:
            raise ConfigError("tokens.smoothing lies between 0 and 1", f"tokens.smoothing={self.smoothing}")

    def statistic(self, view: StepView) -> Tensor:
        """Six numbers a sample, and with ``token_budget=batch`` a response token, flattened, float64.

        Sample: place, 0, PPL, Ent, response tokens, predictable tokens; token: place, position, score, 0, 0, 0.
        """
        batch = view.batch
        trained = torch.bincount(batch.target_sequence, minlength=batch.sequences)
        lengths = torch.bincount(batch.sequence[batch.sequence >= 0], minlength=batch.sequences)
        asked = trained > 0
        place = batch.table_index[asked].double()
        ppl = view.per_sequence_mean(view.token_nll.detach().double()).exp()
        entropy = view.per_sequence_mean(view.token_entropy.double())
        lines = torch.stack(
            [place, torch.zeros_like(place), ppl, entropy, trained[asked].double(), lengths[asked] - 1.0], dim=1
        )
        if self.token_budget == "batch":
            tokens = lines.new_zeros(batch.trained_tokens, 6)
            tokens[:, 0], tokens[:, 1] = batch.table_index[batch.target_sequence], target_positions(batch)
            tokens[:, 2] = self.scores(view)
            lines = torch.cat([lines, tokens])
        return lines.flatten()

    def weigh(self, view: StepView) -> Tensor:
        """The same factor for all tokens of the step that are kept, so that the loss is their mean; 0 for the others."""
        assert view.step_statistics is not None
        step = Step.of(view.step_statistics.cpu().numpy().reshape(-1, 6))
        q2, q4 = choose(step.ppl, step.entropy, self.r_sample)
        places = view.batch.table_index[view.batch.target_sequence].cpu().numpy()
        sample = np.searchsorted(step.place, places)  # of every token of this micro-batch
        if self.token_budget == "per_sample":
            quota = np.maximum(1, np.floor(self.r_token * step.trained + 1e-9))  # 0.29 * 100 is 28.999999999999996
            sequence = view.batch.target_sequence.cpu().numpy()
            stays = ranks(sequence, self._worse(self.scores(view).cpu().numpy())) < quota[sample]
            left = np.where(q2, quota, q4 * step.trained)
        else:
            dropped = self._dropped(step, q2, q4)
            stays = ~np.isin(token_keys(places, target_positions(view.batch).cpu().numpy()), dropped)
            gone = np.bincount(np.searchsorted(step.place, dropped >> POSITION_BITS), minlength=len(step.place))
            left = (q2 | q4) * step.trained - gone
        kept = q4[sample] | (q2[sample] & stays)
        factor = (step.copies @ step.trained) / max(1.0, step.copies @ left)
        return torch.from_numpy(kept * factor).to(view.token_nll)

    def scores(self, view: StepView) -> Tensor:
        """Smoothed perplexity of every response token of a micro-batch, (tokens,) float64."""
        batch = view.batch
        row, before = batch.predicting
        at = before + 1
        own = view.token_nll.detach().double().exp()
        around = own.new_ones(batch.sequence.shape[0], batch.sequence.shape[1] + 1)
        trained = torch.zeros_like(around, dtype=torch.bool)
        around[row, at], trained[row, at] = own, True
        last = torch.ones_like(batch.sequence, dtype=torch.bool)
        last[:, :-1] = batch.sequence[:, 1:] != batch.sequence[:, :-1]
        ends = last[row, at]
        has_left, has_right = trained[row, before], trained[row, at + 1]
        left, right = around[row, before], around[row, at + 1]
        if self.edge == "zero":
            left = torch.where(batch.position_ids[row, before] == 0, 0.0, left)  # the first token has no loss at all
            right = torch.where(ends, 0.0, right)
        else:
            left, right = (
                torch.where(has_left, left, torch.where(has_right, right, own)),
                torch.where(has_right, right, torch.where(has_left, left, own)),
            )
        return (1 - self.smoothing) * own + self.smoothing * (left + right)

    def _worse(self, scores: np.ndarray) -> np.ndarray:
        """Higher for tokens that go first."""
        return scores if self.keep == "low" else -scores

    def _dropped(self, step: Step, q2: np.ndarray, q4: np.ndarray) -> np.ndarray:
        """Keys of the tokens of Q2 that the budget of the whole step leaves no room for.

        Prompts count in the budget, as in the authors' code, and cannot be dropped.
        """
        kept = float(step.tokens[q2 | q4].sum())
        excess = int(kept - round(float(step.tokens.sum()) * self.r_sample * self.r_token))
        if self.r_token == 1 or excess <= 0:
            return step.token_key[:0]
        doubtful = np.flatnonzero(q2[np.searchsorted(step.place, step.token_key >> POSITION_BITS)])
        order = np.argsort(-self._worse(step.token_score[doubtful]), kind="stable")
        return step.token_key[doubtful[order[:excess]]]


def choose(ppl: np.ndarray, entropy: np.ndarray, r_sample: float) -> tuple[np.ndarray, np.ndarray]:
    """Masks of the samples kept as Q2 and as Q4, (samples,) each, from their perplexities and entropies."""
    low, high = 0.0, WIDEST_LEVEL
    q2 = q4 = np.zeros(len(ppl), bool)
    if not len(ppl):
        return q2, q4
    for _ in range(TRIES):
        level = (low + high) / 2
        (ppl_low, ppl_high), (entropy_low, entropy_high) = np.quantile([ppl, entropy], [level, 1 - level], axis=1).T
        q2 = (ppl > ppl_high) & (entropy <= entropy_low)
        q4 = (ppl <= ppl_low) & (entropy > entropy_high)
        share = (q2 | q4).mean()
        if abs(share - r_sample) < TOLERANCE:
            break
        low, high = (level, high) if share < r_sample else (low, level)
    missing = max(1, round(r_sample * len(ppl))) - int((q2 | q4).sum())
    if missing > 0:
        gap = _unit(ppl) - _unit(entropy)
        rest = np.flatnonzero(~(q2 | q4))
        added = rest[np.argsort(-np.abs(gap[rest]), kind="stable")[:missing]]
        q2[added], q4[added] = gap[added] >= 0, gap[added] < 0
    return q2, q4


def _unit(values: np.ndarray) -> np.ndarray:
    """Scaled to 0..1; all 0 where they are equal."""
    spread = np.ptp(values)
    return (values - values.min()) / spread if spread > 0 else np.zeros(len(values))
