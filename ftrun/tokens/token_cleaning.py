"""Token cleaning with a fixed reference model."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ftrun.errors import ComponentError, ConfigError, DataError
from ftrun.registry import register
from ftrun.select.scoring import Scoring
from ftrun.tokens.base import TokenPolicy
from ftrun.tokens.reference import load_reference

if TYPE_CHECKING:
    from ftrun.context import Context
    from ftrun.data.tokens import TokenTable


@register("tokens", "token_cleaning")
@dataclass
class TokenCleaning(TokenPolicy):
    """Train only tokens on which a better model is better (Pang et al., 2025, arXiv:2502.01968).

    score = nll under the model before training - nll under a reference, the same model fine-tuned on good rows. Of all
    N trained tokens the ``int(k * N)`` highest keep their loss, the others lose it; they stay in the input. Equal
    scores go to the earlier token. Training starts from the base model, not from the reference.
    """

    reference: str | None = None  # the reference model: a folder, a hub id, or the run folder that made it
    k: float = 0.6  # share of the trained tokens that is kept
    level: Literal["global", "sample"] = "global"  # one ranking over all rows, or one in each row

    static: ClassVar[bool] = True

    def precompute(self, table: TokenTable, ctx: Context) -> tuple[np.ndarray, np.ndarray]:
        if not self.reference:
            raise ConfigError(
                "tokens=token_cleaning needs a reference model",
                todo="Set tokens.reference to a folder, a hub id, or a run folder.",
            )
        if not 0 < self.k <= 1:
            raise ConfigError(f"tokens.k is a share above 0 and up to 1, not {self.k}", f"tokens.k={self.k}")
        bundle = ctx.bundle
        if bundle is None:
            raise ComponentError("token_cleaning compares the run's model with a reference, and no model is loaded")
        shards = ctx.out / "selection" / "token_shards"
        base = Scoring(lambda: bundle, ctx.team, ctx.report, ctx.settings.select.batch_tokens, shards)
        path = self.reference
        reference = base.with_model(lambda: load_reference(path, bundle, ctx))
        if reference.bundle.fingerprint == bundle.fingerprint:
            ctx.report.warn(
                f"tokens.reference={path} is the run's own model: every score is 0, and the first tokens are kept"
            )
        scores = base.token_nll(table, "score with the model") - reference.token_nll(table, "score with the reference")
        samples = table.offsets[np.append(~table.continues, True)]  # pieces of one text are one sample
        kept = highest(scores, self.k, samples if self.level == "sample" else None)
        if not kept.any():
            trained = int((~np.isnan(scores)).sum())
            raise DataError(
                f"token_cleaning keeps none of {trained} trained tokens", f"tokens.k={self.k}", "Raise tokens.k."
            )
        base.discard()
        return scores, np.where(kept, table.loss_weight, 0).astype(np.float32)


def highest(scores: np.ndarray, k: float, offsets: np.ndarray | None = None) -> np.ndarray:
    """Mask of the ``int(k * n)`` highest of n scores, ties to the earlier; NaN is no score.

    With ``offsets`` (samples + 1,) each sample is ranked by itself.
    """
    kept = np.zeros(len(scores), bool)
    bounds = [0, len(scores)] if offsets is None else offsets.tolist()
    for first, end in pairwise(bounds):
        scored = first + np.flatnonzero(~np.isnan(scores[first:end]))
        order = scored[np.argsort(-scores[scored], kind="stable")]
        kept[order[: int(k * len(scored))]] = True
    return kept
