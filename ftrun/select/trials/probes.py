"""What one step of training on one text changes for other texts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ftrun.data.batches import Batch, cut_batches, token_budget
from ftrun.data.tokens import TokenTable
from ftrun.models.bundle import Bundle
from ftrun.models.fast import packs_for_free
from ftrun.models.head import token_nll
from ftrun.training.gradients import gradients_of
from ftrun.training.scoring import aligned_batch, nll_of_batch

EPSILON = 1e-8  # of Adam


@dataclass
class InformationGain:
    """A measure: by how much the perplexity of ``objective`` falls when the model takes one step on a text alone.

    The step is the first one of AdamW without weight decay, all weights train, and dropout is off. Every text finds the
    weights that the model has outside, to the bit.
    """

    texts: TokenTable
    objective: TokenTable
    learning_rate: float
    clip: float | None  # bound of the gradient's norm

    def __post_init__(self) -> None:
        self._before: float | None = None
        self._batches: list[Batch] = []

    def __call__(self, bundle: Bundle, batch: Batch) -> list[np.ndarray]:
        if self._before is None:
            self._batches = objective_batches(self.objective, bundle)
            self._before = perplexity(self._batches, bundle)
        return [np.array([self.gain(bundle, index)]) for index in batch.table_index.tolist()]

    def gain(self, bundle: Bundle, index: int) -> float:
        """IG of one text: perplexity before minus perplexity after the step."""
        assert self._before is not None
        with one_step(bundle, aligned_batch(self.texts, [index], False, bundle), self.learning_rate, self.clip):
            return self._before - perplexity(self._batches, bundle)


@contextmanager
def one_step(bundle: Bundle, batch: Batch, learning_rate: float, clip: float | None) -> Iterator[None]:
    """The model after one step on the mean loss of ``batch``; afterwards its weights are those from before, to the bit."""
    parameters = list(bundle.model.parameters())
    gradients = _gradients(bundle, batch, parameters)
    norm = torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm()
    factor = 1.0 if clip is None else float((clip / (norm + 1e-6)).clamp(max=1.0))
    saved: list[tuple[nn.Parameter, Tensor]] = []
    try:
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    saved.append((parameter, parameter.detach().clone()))
                    # both moments of Adam's first step, bias corrected, are the gradient itself and its square
                    direction = gradient.float().mul_(factor)
                    direction /= direction.abs().add_(EPSILON)
                    parameter.sub_(direction.to(parameter.dtype), alpha=learning_rate)
        del gradients
        yield
    finally:
        with torch.no_grad():
            for parameter, before in saved:
                parameter.copy_(before)


def _gradients(bundle: Bundle, batch: Batch, parameters: list[nn.Parameter]) -> list[Tensor | None]:
    trained = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(parameter.is_floating_point())
        with torch.enable_grad():
            hidden = bundle.architecture.hidden_states(bundle.model, batch)[batch.predicting]
            loss = token_nll(hidden, bundle.architecture.head(bundle.model), batch.target_ids).mean()
            return gradients_of(loss, parameters)
    finally:
        for parameter, before in zip(parameters, trained, strict=True):
            parameter.requires_grad_(before)


def objective_batches(table: TokenTable, bundle: Bundle) -> list[Batch]:
    """All texts of ``table``, in batches as scoring cuts them."""
    packed = packs_for_free(bundle.model, bundle.architecture)
    cut = cut_batches(np.asarray(table.lengths), token_budget(None, bundle.device), packed)
    return [aligned_batch(table, [index for row in batch for index in row], packed, bundle) for batch in cut]


@torch.no_grad()
def perplexity(batches: list[Batch], bundle: Bundle) -> float:
    """exp of the mean over the texts of their mean loss: a long text counts no more than a short one."""
    means = [nll.mean(dtype=np.float64) for batch in batches for nll in nll_of_batch(bundle, batch)]
    return float(np.exp(np.mean(means)))
