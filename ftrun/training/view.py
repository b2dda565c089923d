"""What a step knows of a micro-batch, computed when first asked for and only once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from ftrun.data.batches import Batch
from ftrun.models.architecture import Architecture
from ftrun.models.attention import AttentionCall, kept_calls
from ftrun.models.head import token_entropy, token_nll
from ftrun.models.precision import products
from ftrun.models.wrappers import changed_output, unwrap


@dataclass
class StepView:
    """Lazy results of one forward pass over ``batch``.

    Per-token tensors are flat, one entry a trained token, in the order of ``batch.targets()``.
    """

    model: nn.Module
    architecture: Architecture
    batch: Batch
    reference: Callable[[], AbstractContextManager[nn.Module]] | None = None  # yields the model before training
    step_statistics: Tensor | None = None  # what TokenPolicy.statistic gave for the whole optimiser step
    factors: Tensor | None = None  # what the token policy weighed, (tokens,); None: all ones
    perturb: Callable[[Tensor, Batch], Tensor] | None = None  # TokenPolicy.perturb of this optimiser step
    counts: dict[str, float] = field(default_factory=dict)  # Objective.counts, added up over the whole step
    step: int = 0  # optimiser steps done before this one
    steps: int = 1  # optimiser steps of the whole run
    watched_layer: int | None = None  # TokenPolicy.watched_layer
    parts: dict[str, Tensor] = field(default_factory=dict)  # sums that the token policy wants to see in metrics.jsonl

    @cached_property
    def states(self) -> Tensor:
        """Final hidden states of every position, padding included, (rows, time, width)."""
        with self._perturbed(), self._watched():
            return self.architecture.hidden_states(self.model, self.batch)

    @cached_property
    def hidden(self) -> Tensor:
        """Final hidden states at the positions that predict a trained token, (tokens, width)."""
        return self.states[self.batch.predicting]

    @cached_property
    def token_nll(self) -> Tensor:
        """Negative log-likelihood of every trained token, (tokens,), with gradient."""
        return token_nll(self.hidden, self.architecture.head(self.model), self.batch.target_ids)

    @cached_property
    def token_entropy(self) -> Tensor:
        """Entropy of the prediction of every trained token in nats, (tokens,), without gradient; no logits are kept."""
        return token_entropy(self.hidden.detach(), self.architecture.head(self.model))

    @cached_property
    def logits(self) -> Tensor:
        """Logits at the predicting positions, (tokens, vocabulary). Large: only for methods that cannot do without."""
        return self.architecture.head(self.model).logits(self.hidden)

    @cached_property
    def class_logits(self) -> Tensor:
        """Logits of a sequence classifier, (sequences, labels)."""
        with self._perturbed():
            return self.model(input_ids=self.batch.input_ids, attention_mask=self.batch.attention_mask).logits

    @cached_property
    def reference_nll(self) -> Tensor:
        """``token_nll`` under the model before training, without gradient, (tokens,)."""
        assert self.reference is not None, "the objective did not declare uses_reference"
        with torch.no_grad(), self.reference() as model:
            hidden = self.architecture.hidden_states(model, self.batch)[self.batch.predicting]
            return token_nll(hidden, self.architecture.head(model), self.batch.target_ids)

    def attention_to(self, seen: Tensor) -> Tensor:
        """Share of its attention that each trained token gives to the tokens in ``seen``, (tokens,), without gradient.

        ``seen``: (rows, time) bool. The share is a mean over the heads of the layer that the token policy watches; that
        layer's map is computed once more for it, in evaluation mode and one sequence at a time.
        """
        assert self.watched_layer is not None, "the token policy does not say which layer it watches"
        _ = self.hidden
        row, before = self.batch.predicting
        found = torch.zeros(len(row), device=row.device)
        for place, start, end in self.batch.spans():
            mine = (row == place) & (before >= start) & (before < end)
            if mine.any():
                with products(self.model):
                    heads = self._watched_call[0].map_of(place, start, end)
                share = heads.float().mean(dim=0) @ seen[place, start:end].float()
                found[mine] = share[before[mine] + 1 - start]
        return found

    @property
    def weights(self) -> Tensor:
        """Loss weight of every trained token, the token policy's factor included, (tokens,)."""
        static = self.batch.target_weights
        return static if self.factors is None else static * self.factors

    @cached_property
    def _watched_call(self) -> list[AttentionCall]:
        return []

    def _watched(self) -> AbstractContextManager[None]:
        """A context that keeps what the watched attention is given."""
        if self.watched_layer is None:
            return nullcontext()
        if self.batch.attention is not None:
            self.architecture.check_masks(self.model)
        elif self.batch.packed:
            self.architecture.packing_way(self.model)  # trials that must not be taken for the batch
        return kept_calls(self.architecture.layers[self.watched_layer], self._watched_call)

    def _perturbed(self) -> AbstractContextManager[None]:
        """A context in which the token embedding gives what the token policy makes of it."""
        change = self.perturb
        if change is None:
            return nullcontext()
        if self.batch.attention is not None:
            self.architecture.check_masks(self.model)
        elif self.batch.packed:
            self.architecture.packing_way(self.model)  # trials that must not see the change
        embedding = unwrap(self.model).get_input_embeddings()  # type: ignore[operator]
        return changed_output(embedding, lambda embeddings: change(embeddings, self.batch))

    def per_sequence_sum(self, values: Tensor) -> Tensor:
        """Sums of per-token values over each sequence, (sequences,)."""
        totals = torch.zeros(self.batch.sequences, dtype=values.dtype, device=values.device)
        return totals.index_add(0, self.batch.target_sequence, values)

    def per_sequence_mean(self, values: Tensor) -> Tensor:
        """Means of per-token values over each sequence that has a trained token, (sequences with tokens,)."""
        counts = self.per_sequence_sum(torch.ones_like(values))
        return (self.per_sequence_sum(values) / counts)[counts > 0]
