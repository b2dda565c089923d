"""Several token policies at once, as in ``tokens=[token_cleaning,talr]``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ftrun.errors import ConfigError
from ftrun.tokens.base import TokenPolicy

if TYPE_CHECKING:
    from ftrun.data.batches import Batch
    from ftrun.data.records import Record
    from ftrun.data.tokens import TokenTable
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context
    from ftrun.training.parts import Loop
    from ftrun.training.view import StepView

ABILITIES = ("edits", "edits_heldout", "edit_uses_model", "static", "drops_empty")
ABILITIES += ("remembers", "dynamic", "whole_step", "perturbs", "arranges")


@dataclass
class Several(TokenPolicy):
    """Policies in order: weights of all are multiplied, embeddings are changed by one after the other.

    Only one may edit rows and only one may arrange batches: the next would not know what it is given. Raises
    ConfigError otherwise.
    """

    policies: list[TokenPolicy]

    def __post_init__(self) -> None:
        for ability in ABILITIES:
            setattr(self, ability, any(getattr(policy, ability) for policy in self.policies))
        self.packs = all(policy.packs for policy in self.policies)  # type: ignore[misc]
        self.eats = next((policy.eats for policy in self.policies if policy.eats), ())  # type: ignore[misc]
        for ability, words in (("edits", "change the rows"), ("arranges", "arrange batches anew")):
            able = [_name(policy) for policy in self.policies if getattr(policy, ability)]
            if len(able) > 1:
                raise ConfigError(
                    f"{' and '.join(able)} both {words}", f"tokens=[{','.join(able)}]", "Use one of them."
                )
        for adds in self.policies:
            others = [
                _name(other) for other in self.policies if other is not adds and (other.dynamic or other.remembers)
            ]
            if type(adds).input_lengths is not TokenPolicy.input_lengths and others:
                raise ConfigError(
                    f"{_name(adds)} puts inputs of its own between the tokens, which {others[0]} would weigh as if they were text",
                    f"tokens=[{_name(adds)},{','.join(others)}]",
                    f"Use tokens={_name(adds)} alone, or with a method that weighs before training.",
                )

    def _able(self, ability: str) -> list[TokenPolicy]:
        return [policy for policy in self.policies if getattr(policy, ability)]

    def edit(self, records: Iterable[Record], ctx: Context) -> Iterator[dict[str, Any]]:
        (policy,) = self._able("edits")
        return policy.edit(records, ctx)

    def edit_prompt(self, record: Record) -> Record:
        for policy in self._able("edits"):
            record = policy.edit_prompt(record)
        return record

    def precompute(self, table: TokenTable, ctx: Context) -> tuple[np.ndarray, np.ndarray]:
        """Each policy scores the table that the one before has weighed; the scores are those of the last."""
        scores = np.full(len(table.input_ids), np.nan)
        for policy in self._able("static"):
            scores, weights = policy.precompute(table, ctx)
            table = table.with_weights(weights)
        return scores, np.asarray(table.loss_weight)

    def remember(self, table: TokenTable, ctx: Context) -> dict[str, np.ndarray]:
        """What each remembers. Raises ConfigError where two policies use one name for it."""
        found: dict[str, np.ndarray] = {}
        for policy in self._able("remembers"):
            new = policy.remember(table, ctx)
            for name in new.keys() & found.keys():
                raise ConfigError(f"two token policies remember {name}", f"tokens.{_name(policy)}", "Use one of them.")
            found |= new
        return found

    def attach(self, bundle: Bundle, ctx: Context) -> nn.Module | None:
        made = {_name(policy): policy.attach(bundle, ctx) for policy in self.policies}
        modules = {name: module for name, module in made.items() if module is not None}
        return nn.ModuleDict(modules) if modules else None

    def order(self, table: TokenTable) -> np.ndarray | None:
        """The order of the one that has one. Raises ConfigError where two have."""
        orders = {_name(policy): policy.order(table) for policy in self.policies}
        given = {name: order for name, order in orders.items() if order is not None}
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} both order the rows", todo="Use one of them.")
        return next(iter(given.values()), None)

    def before_step(self, step: int, trainer: Loop) -> None:
        for policy in self.policies:
            policy.before_step(step, trainer)

    def watched_layer(self) -> int | None:
        """The layer of the one that watches one; only sstoken does."""
        return next((layer for policy in self.policies if (layer := policy.watched_layer()) is not None), None)

    def input_lengths(self, table: TokenTable) -> np.ndarray:
        able = self._able("arranges")
        return able[0].input_lengths(table) if able else table.lengths

    def arrange(self, batch: Batch, seed: tuple[int, int], progress: float) -> Batch:
        (policy,) = self._able("arranges")
        return policy.arrange(batch, seed, progress)

    def perturb(self, embeddings: Tensor, batch: Batch, seed: tuple[int, int]) -> Tensor:
        for policy in self._able("perturbs"):
            embeddings = policy.perturb(embeddings, batch, seed)
        return embeddings

    def statistic(self, view: StepView) -> Tensor:
        """Pairs of (number of the policy, its value), flattened, in double precision."""
        parts = []
        for number, policy in enumerate(self._able("whole_step")):
            values = policy.statistic(view).double().flatten()
            parts.append(torch.stack([torch.full_like(values, number), values], dim=1))
        return torch.cat(parts).flatten()

    def weigh(self, view: StepView) -> Tensor:
        """The product of all factors."""
        whole = view.step_statistics
        asking = self._able("whole_step")
        product = torch.ones_like(view.batch.target_weights)
        for policy in self._able("dynamic"):
            if whole is not None and policy in asking:
                number, values = whole.view(-1, 2).unbind(dim=1)
                view.step_statistics = values[number == asking.index(policy)]
            product = product * policy.weigh(view)
        view.step_statistics = whole
        return product


def _name(policy: TokenPolicy) -> str:
    return policy.name  # type: ignore[attr-defined]
