"""Gradients of single rows, shortened by random projection, for methods that compare what rows would teach."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from ftrun.data.tokens import TokenTable
from ftrun.errors import ComponentError
from ftrun.models.head import token_nll
from ftrun.training.gradients import gradients_of
from ftrun.training.scoring import aligned_batch

if TYPE_CHECKING:
    from ftrun.data.batches import Batch
    from ftrun.data.tokens import TokenTable
    from ftrun.models.bundle import Bundle
    from ftrun.select.trials.inner import Checkpoint

SIGNS_AT_ONCE = 2**22  # entries of the projection that exist at one time: 16 MB
GRADIENT_BYTES = 2**29  # gradients that wait for one pass over the projection
TOGETHER = 16  # rows of one product: always the same number, since the shape of a product can change its rounding
GOLDEN = -0x61C8864680B583EB  # step between the numbers that are scrambled
SIGNS_OF_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(np.float32) * 2 - 1


@dataclass
class Projection:
    """A matrix of random signs (parameters, dimension), divided by the root of ``dimension``, that never exists whole.

    Signs follow from ``seed`` and their place alone, on every device, where they are also made: a large model has so many
    that bringing them there would take longer than all the rest. Inner products stay what they are in expectation.
    """

    dimension: int
    seed: int

    def project(self, rows: Tensor) -> Tensor:
        """(rows, parameters) float32 to (rows, dimension)."""
        count, parameters = rows.shape
        result = torch.zeros(-(-count // TOGETHER) * TOGETHER, self.dimension, device=rows.device)
        height = max(1, SIGNS_AT_ONCE // self.dimension)
        for block, start in enumerate(range(0, parameters, height)):
            part = rows[:, start : start + height]
            signs = self.signs(block, part.shape[1], rows.device)
            for first in range(0, count, TOGETHER):
                together = part[first : first + TOGETHER]
                padded = torch.zeros(TOGETHER, part.shape[1], device=rows.device)
                padded[: len(together)] = together
                result[first : first + TOGETHER] += padded @ signs
        return result[:count] / self.dimension**0.5

    def signs(self, block: int, height: int, device: torch.device | str = "cpu") -> Tensor:
        """+1 and -1 of one block, (height, dimension) float32."""
        size = height * self.dimension
        number = torch.arange(1, -(-size // 64) + 1, device=device) + (block << 32)
        words = scrambled(number * GOLDEN + scrambled(torch.tensor(self.seed, device=device)))
        table = torch.from_numpy(SIGNS_OF_BYTE).to(device)
        signs = table.index_select(0, words.view(torch.uint8).int())  # on a CPU much faster than table[...]
        return signs.reshape(-1)[:size].reshape(height, self.dimension)


def scrambled(words: Tensor) -> Tensor:
    """Numbers that look random from any 64-bit numbers, int64 (splitmix64: Steele et al., 2014); products wrap around."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        without_sign = (1 << (64 - shift)) - 1  # a shift of a negative number fills in ones
        words = (words ^ ((words >> shift) & without_sign)) * factor
    return words


@dataclass
class GradientFeatures:
    """A measure: the gradient of each row's mean response loss, alone in its batch, projected and of unit length.

    The gradient is that of the parameters that ``checkpoint`` names, with the weights that the model has. ``adam`` turns
    it into the direction of the Adam step that it would make: ``m' / sqrt(v' + epsilon)`` with
    ``m' = beta1 m + (1 - beta1) g`` and ``v' = beta2 v + (1 - beta2) g^2``, no bias correction. Zeros stay zeros.
    """

    table: TokenTable
    checkpoint: Checkpoint
    projection: Projection
    adam: bool
    _moments: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    BETA1: ClassVar[float] = 0.9
    BETA2: ClassVar[float] = 0.999
    EPSILON: ClassVar[float] = 1e-8  # inside the root

    @property
    def rows_at_once(self) -> int:
        """Rows whose gradients fit in `GRADIENT_BYTES`, `TOGETHER` at least."""
        return max(TOGETHER, GRADIENT_BYTES // (4 * self._parameter_count) // TOGETHER * TOGETHER)

    @property
    def _parameter_count(self) -> int:
        return sum(weight.numel() for weight in self.checkpoint.weights.values())

    def __call__(self, bundle: Bundle, batch: Batch) -> list[np.ndarray]:
        features: list[np.ndarray] = []
        indices = batch.table_index.tolist()
        for start in range(0, len(indices), self.rows_at_once):
            some = indices[start : start + self.rows_at_once]
            gradients = torch.empty(len(some), self._parameter_count, device=bundle.device)
            for place, index in enumerate(some):
                gradients[place] = self.gradient(bundle, index)
            projected = self.projection.project(gradients).cpu().numpy()
            features += list(projected / np.maximum(np.linalg.norm(projected, axis=1, keepdims=True), 1e-30))
        return features

    def gradient(self, bundle: Bundle, index: int) -> Tensor:
        """Of one row of the table, (parameters,) float32 on the model's device; with ``adam`` the step."""
        single = aligned_batch(self.table, [index], False, bundle)
        parameters = self._parameters(bundle)
        with torch.enable_grad():
            hidden = bundle.architecture.hidden_states(bundle.model, single)[single.predicting]
            loss = token_nll(hidden, bundle.architecture.head(bundle.model), single.target_ids).mean()
            found = gradients_of(loss, parameters)
        gradient = torch.cat(
            [
                (torch.zeros_like(parameter) if part is None else part).reshape(-1).float()
                for parameter, part in zip(parameters, found, strict=True)
            ]
        )
        return self._step(gradient) if self.adam else gradient

    def _step(self, gradient: Tensor) -> Tensor:
        if self._moments is None:
            first, second = self.checkpoint.exp_avg, self.checkpoint.exp_avg_sq
            self._moments = tuple(
                torch.cat([moments[name].reshape(-1).float() for name in self.checkpoint.weights]).to(gradient.device)
                for moments in (first, second)
            )  # type: ignore[assignment]
        assert self._moments is not None
        first, second = self._moments
        first = self.BETA1 * first + (1 - self.BETA1) * gradient
        second = self.BETA2 * second + (1 - self.BETA2) * gradient.square()
        return first / (second + self.EPSILON).sqrt()

    def _parameters(self, bundle: Bundle) -> list[Tensor]:
        """Those of the checkpoint, by name, in its order."""
        known = dict(bundle.model.named_parameters())
        missing = [name for name in self.checkpoint.weights if name not in known or not known[name].requires_grad]
        if missing:
            raise ComponentError(f"the model has no trained parameter {missing[0]}, which its checkpoint names")
        return [known[name] for name in self.checkpoint.weights]


def joined(tables: list[TokenTable]) -> TokenTable:
    """One table of all sequences."""
    return TokenTable.from_sequences([table.sequence(i) for table in tables for i in range(len(table.lengths))])
