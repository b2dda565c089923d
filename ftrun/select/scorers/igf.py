"""Information gain filtration: what one step on a text brings, measured for some texts and learned for all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from ftrun.adapters.peft_adapter import is_quantised, seeded
from ftrun.data.tokens import TokenTable
from ftrun.errors import ComponentError, ConfigError, DataError
from ftrun.registry import register
from ftrun.runs.artifacts import digest
from ftrun.select.base import Scorer
from ftrun.select.geometry.gradients import joined
from ftrun.select.queries import load_queries
from ftrun.select.trials.inner import by_content, prepared_rows
from ftrun.select.trials.probes import InformationGain
from ftrun.select.trials.secondary import Fit, SecondaryLearner

if TYPE_CHECKING:
    from ftrun.data.batches import Batch
    from ftrun.data.pool import Pool
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context

HELD = 512  # probed texts on which the secondary learner is tried, at most a quarter of all
FEWEST = 8  # probed texts
OBJECTIVE_SHARE = 5  # without queries and held-out rows, one in five texts of the pool at most is the objective


@register("select", "igf")
@dataclass
class Igf(Scorer):
    """Texts that would lower the perplexity of an objective (Antonello et al., 2021, arXiv:2005.00175).

    For each of m random texts X the model takes one optimiser step on X alone, always from the same weights, and
    IG(X) = ppl(objective) before - ppl(objective) after. IG is standardised over the m texts. A small convolutional
    network over the model's token embeddings, the secondary learner, is fitted to them by squared error and predicts
    q for every text of the pool. A text is a row as training sees it, or a piece of a long one; a row's q is the mean
    over its pieces. The objective are the rows of ``select.queries``, else the held-out rows, else a part of the pool.
    """

    probes: int = 1000  # m, texts whose gain is measured
    objective: int = 100  # texts of the objective
    learning_rate: float = 5e-5  # of the one step
    clip: float | None = 3.0  # bound of its gradient norm
    learner_epochs: int = 15  # passes of the secondary learner over the probed texts
    learner_batch_size: int = 128  # texts of one of its steps
    learner_rate: float = 1e-5  # of its Adam
    units: Literal["pool", "pairs"] = "pool"  # q in standard deviations of q over the pool, or of IG over the m texts

    column: ClassVar[str] = "igf"
    own_picker: ClassVar[str] = "igf"

    def __post_init__(self) -> None:
        for name in ("objective", "learning_rate", "learner_epochs", "learner_batch_size", "learner_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"select.{name} must be above 0", f"select.{name}={getattr(self, name)}")
        if self.clip is not None and not self.clip > 0:
            raise ConfigError("select.clip must be above 0, or null", f"select.clip={self.clip}")
        if self.probes < FEWEST:
            raise ConfigError(f"igf learns from {FEWEST} probed texts at least", f"select.probes={self.probes}")

    def planned_tokens(self, lengths: np.ndarray) -> float:
        return min(self.probes, len(lengths)) * (self.objective + 3.0) * float(lengths.mean())

    def score(self, pool: Pool, ctx: Context) -> dict[str, np.ndarray]:
        """q, the learner's own output, and the standardised gain of the rows that were probed, (rows,) each.

        A row that training would drop has none of them.
        """
        bundle = self._checked(ctx)
        table, place = self._texts(pool, ctx)
        objective, others = self._objective(table, ctx)
        drawn = others[: self.probes]
        gain = standardised(self._gains(table.rows(drawn), objective, ctx))
        learner = self._learner(bundle, table.rows(drawn), gain, ctx)
        learned = row_mean(self._predictions(learner, table, ctx), place, len(pool))
        q = standardised(learned) if self.units == "pool" else learned
        return {"igf": q, "learned": learned, "gain": row_mean(gain, place[drawn], len(pool))}

    # ---- the texts ----

    def _checked(self, ctx: Context) -> Bundle:
        bundle = ctx.scorer.bundle
        if is_quantised(bundle.model):
            raise ConfigError(
                f"igf takes steps on all weights of {bundle.path}, which are quantised",
                todo="Use quant=none, or probe another model: select.model.path=...",
            )
        if bundle.dtype != torch.float32:
            ctx.report.warn(
                f"a step of {self.learning_rate:g} may be lost in the rounding of weights in {bundle.dtype}: "
                "model.dtype=float32 measures gains better"
            )
        return bundle

    def _texts(self, pool: Pool, ctx: Context) -> tuple[TokenTable, np.ndarray]:
        """The pool as it would be trained, and the place in the pool of every text of that table."""
        prepared = prepared_rows(pool, ctx, ("sft", "text"))
        place = {number: place for place, number in enumerate(pool.ids.tolist())}
        for reason, ids in prepared.dropped.items():
            ctx.scorer.reasons |= {place[number]: reason for number in ids}
        return prepared.table, np.array([place[number] for number in prepared.table.record.tolist()], np.int64)

    def _objective(self, table: TokenTable, ctx: Context) -> tuple[TokenTable, np.ndarray]:
        """Texts of the objective, and positions of those of ``table`` that may be probed, in random order by content."""
        trained = table.trained_counts() > 0
        order = by_content(table, f"igf {ctx.seed}")
        order = order[trained[order]]
        if ctx.settings.select.queries:
            pools = load_queries(ctx.settings).pools
            found = joined([prepared_rows(rows, ctx, ("sft", "text")).table for rows in pools])
        elif ctx.heldout is not None:
            found = prepared_rows(ctx.heldout, ctx, ("sft", "text")).table
        else:
            count = min(self.objective, len(order) // OBJECTIVE_SHARE)
            ctx.report.note(f"igf: {count} texts of the pool are the objective; select.queries=[...] names better ones")
            found, order = table.rows(order[:count]), order[count:]
        kept = by_content(found, f"igf objective {ctx.seed}")
        kept = kept[found.trained_counts()[kept] > 0][: self.objective]
        if not len(kept) or len(order) < FEWEST:
            raise DataError(
                f"igf needs an objective and {FEWEST} texts to probe; there are {len(kept)} and {len(order)}",
                f"data.path={ctx.settings.data.path}",
                "Give more rows, or the objective's with select.queries=[dev.jsonl].",
            )
        if len(order) < self.probes:
            ctx.report.note(f"igf: {len(order):,} texts are probed, fewer than select.probes={self.probes:,}")
        return found.rows(kept), order

    # ---- gains ----

    def _gains(self, texts: TokenTable, objective: TokenTable, ctx: Context) -> np.ndarray:
        """IG of each text, (texts,)."""
        bundle = ctx.scorer.bundle
        scoring = replace(ctx.scorer.with_model(lambda: bundle), batch_tokens=1)  # a text is a batch of its own
        measure = InformationGain(texts, objective, self.learning_rate, self.clip)
        name = f"gain-{digest([objective.fingerprint(), self.learning_rate, self.clip])}"
        gains = np.concatenate(scoring.measure(texts, name, measure, "probe texts")).astype(np.float64)
        ctx.report.note(
            f"igf: one step on a text lowers the objective's perplexity by {gains.mean():.3g} on average, "
            f"standard deviation {gains.std():.3g}"
        )
        if not gains.std() > 0:
            raise ComponentError(
                "every probed text brings the same gain: there is nothing to learn from",
                f"select.learning_rate={self.learning_rate:g}",
                "Raise it, or use model.dtype=float32.",
            )
        return gains

    # ---- the secondary learner ----

    def _learner(self, bundle: Bundle, texts: TokenTable, gain: np.ndarray, ctx: Context) -> SecondaryLearner:
        """Fitted to the gains by the first process; the others get what it learned."""
        made = [np.asarray(texts.sequence(index).input_ids) for index in range(len(texts))]
        embedding = bundle.model.get_input_embeddings().weight  # type: ignore[operator]
        held = min(HELD, len(made) // 4)
        fit = Fit(self.learner_epochs, self.learner_batch_size, self.learner_rate, held)
        with seeded(ctx.seed):
            learner = SecondaryLearner(embedding, np.unique(texts.input_ids))
            if ctx.team.rank == 0:
                with ctx.report.task("learn the gains", None):
                    error = fit.train(learner, made, gain)
                self._tell(error, gain[:held], ctx)
        state = {name: value.cpu() for name, value in learner.state_dict().items()}
        learner.load_state_dict(ctx.team.gather_object(state if ctx.team.rank == 0 else None)[0])
        return learner.eval()

    def _tell(self, error: float, held: np.ndarray, ctx: Context) -> None:
        explained = 1 - error / float(np.mean((held - held.mean()) ** 2))
        ctx.report.note(
            f"igf: the secondary learner explains {explained:.1%} of the variance of {len(held)} held-out gains"
        )
        if explained <= 0:
            ctx.report.warn(
                "the secondary learner predicts gains no better than their mean does: the choice is close to random. "
                "Raise select.probes, select.learner_epochs or select.learner_rate"
            )

    def _predictions(self, learner: SecondaryLearner, table: TokenTable, ctx: Context) -> np.ndarray:
        """What the learner says of every text, (texts,)."""

        def predict(bundle: Bundle, batch: Batch) -> list[np.ndarray]:
            return list(learner(batch.input_ids, batch.sequence >= 0).float().cpu().numpy())

        found = ctx.scorer.measure(table, f"q-{learner.fingerprint()}", predict, "predict gains")
        return np.concatenate(found).astype(np.float64)


def standardised(values: np.ndarray) -> np.ndarray:
    """Mean 0 and standard deviation 1 over what is known; zeros where all are the same."""
    spread = np.nanstd(values)
    return (values - np.nanmean(values)) / (spread if spread > 0 else 1.0)


def row_mean(values: np.ndarray, place: np.ndarray, rows: int) -> np.ndarray:
    """Mean of the values of each row, (rows,); NaN where it has none. ``place``: the row of each value."""
    count = np.bincount(place, minlength=rows)
    total = np.bincount(place, weights=values, minlength=rows)
    return np.divide(total, count, out=np.full(rows, np.nan), where=count > 0)
