"""Weights from how likely the model would go on as the data does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.tokens.base import TokenPolicy
from ftrun.tokens.reference import load_reference, own_scoring
from ftrun.training.view import StepView

if TYPE_CHECKING:
    from ftrun.data.tokens import TokenTable
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context

LOOKED_AT = 256  # rows whose weights are reported before training


@register("tokens", "pear")
@dataclass
class Pear(TokenPolicy):
    """Trains a token as much as the model would write what follows it (Zhang et al., 2026, arXiv:2602.01058).

    For the T trained tokens of a sequence d_t = clip(log pi_theta(y_t) - log pi_beta(y_t), ratio_floor, ratio_ceiling),
    with pi_theta the model being trained and pi_beta the model that wrote the data. Per variant:

    - ``token``: log G_t = (T - t) log(gamma) + sum of d_j over j > t; the last token weighs 1.
    - ``block``: tokens of a block of ``block`` share log G = (T - end) log(gamma) + sum of d_j over later blocks.
    - ``sequence``: log G = sum of all d_t, for every token.

    The weight is exp(clip(log G, weight_floor, weight_ceiling)), without gradient; the loss is divided by the number of
    trained tokens.
    """

    behaviour: str | None = None  # the model that wrote the responses: a folder, a hub id, or a run folder
    variant: Literal["token", "block", "sequence"] = "token"  # what shares a weight
    gamma: float = 0.999  # discount of every later token
    block: int = 4  # tokens in a block (B)
    ratio_floor: float = -0.08  # lowest log ratio of a token
    ratio_ceiling: float = 0.3  # highest log ratio of a token
    weight_floor: float = -10.0  # lowest log weight (G_min)
    weight_ceiling: float = 5.0  # highest log weight (G_max)

    needs: ClassVar[dict[str, str]] = {"token_loss": "weighs the loss of every token"}
    remembers: ClassVar[bool] = True
    dynamic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise ConfigError(
                f"tokens.gamma lies above 0 and is at most 1, not {self.gamma}", f"tokens.gamma={self.gamma}"
            )
        if self.block < 1:
            raise ConfigError(f"tokens.block is a number of tokens, not {self.block}", f"tokens.block={self.block}")
        for name, low, high in (
            ("ratio", self.ratio_floor, self.ratio_ceiling),
            ("weight", self.weight_floor, self.weight_ceiling),
        ):
            if not low <= high:
                raise ConfigError(f"tokens.{name}_floor={low} lies above tokens.{name}_ceiling={high}", "tokens=pear")

    def remember(self, table: TokenTable, ctx: Context) -> dict[str, np.ndarray]:
        """Losses of all trained tokens under the model that wrote them; says how the weights lie before training."""
        path = self.behaviour
        if not path:
            raise ConfigError(
                "tokens=pear needs the model that wrote the responses",
                todo="Set tokens.behaviour to a folder, a hub id, or a run folder.",
            )
        student = own_scoring(ctx)
        writer = student.with_model(lambda: _load(path, student.bundle, ctx))
        written = table.with_remembered({"behaviour_nll": writer.token_nll(table, "score with the behaviour model")})
        some = written.rows(np.unique(np.linspace(0, len(written) - 1, min(LOOKED_AT, len(written))).astype(np.int64)))
        self._report_start(some, student.token_nll(some, "score with the model"), ctx)
        student.discard()
        return {"behaviour_nll": written.remembered["behaviour_nll"]}

    def weigh(self, view: StepView) -> Tensor:
        gain = view.batch.remembered_targets("behaviour_nll") - view.token_nll.detach()
        return self.log_weights(gain, view.batch.target_sequence).exp().to(view.token_nll)

    def log_weights(self, gain: Tensor, sequence: Tensor) -> Tensor:
        """log G of tokens that are (tokens,) likelier under the model than under the writer, float64.

        ``sequence`` (tokens,) rises: the tokens of a sequence stand together, in their order.
        """
        d = gain.double().clamp(self.ratio_floor, self.ratio_ceiling)
        lengths = torch.unique_consecutive(sequence, return_counts=True)[1]
        last = torch.repeat_interleave(lengths.cumsum(0) - 1, lengths)  # place of y_T, for every token
        first = last - torch.repeat_interleave(lengths, lengths) + 1
        so_far = d.cumsum(0)
        if self.variant == "sequence":
            log_g = so_far[last] - so_far[first] + d[first]
        else:
            size = self.block if self.variant == "block" else 1
            places = torch.arange(len(d), device=d.device)
            end = torch.minimum(first + ((places - first) // size + 1) * size - 1, last)  # of the token's block
            log_g = (last - end).double() * math.log(self.gamma) + so_far[last] - so_far[end]
        return log_g.clamp(self.weight_floor, self.weight_ceiling)

    def _report_start(self, some: TokenTable, nll: np.ndarray, ctx: Context) -> None:
        gain = some.remembered["behaviour_nll"] - nll
        known = ~np.isnan(gain)
        if not known.any():
            return
        sequence = np.repeat(np.arange(len(some.lengths)), some.lengths)[known]
        log_g = self.log_weights(torch.from_numpy(gain[known]), torch.from_numpy(sequence)).numpy()
        low, tenth, middle, ninetieth, high = np.quantile(log_g, [0, 0.1, 0.5, 0.9, 1])
        ctx.report.note(
            f"log weights before training, over {known.sum():,} tokens: lowest {low:.2f}, 10% {tenth:.2f}, "
            f"median {middle:.2f}, 90% {ninetieth:.2f}, highest {high:.2f}"
        )
        silent = float((log_g <= self.weight_floor).mean())
        if silent >= 0.5:
            ctx.report.warn(
                f"{silent:.0%} of the tokens start at the lowest weight, exp({self.weight_floor:g}): they teach next to "
                "nothing. The data may come from a model too far from this one"
            )


def _load(path: str, bundle: Bundle, ctx: Context) -> Bundle:
    try:
        return load_reference(path, bundle, ctx)
    except ConfigError as problem:
        problem.where = f"tokens.behaviour={path}"  # there it is the path of a reference
        raise
