"""Multi-token prediction by registers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ftrun.data.batches import Targets
from ftrun.errors import ConfigError
from ftrun.registry import register
from ftrun.tokens.base import TokenPolicy
from ftrun.tokens.learned_embedding import LearnedEmbedding

if TYPE_CHECKING:
    from ftrun.data.batches import Batch
    from ftrun.data.tokens import TokenTable
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context
    from ftrun.training.view import StepView


@register("tokens", "mutor")
@dataclass
class Mutor(TokenPolicy):
    """Registers between the answer's tokens that predict further ahead (Gerontopoulos et al., 2025, arXiv:2505.10518).

    One register stands before every answer token a_j; it sees the tokens before it and no other register, has the
    position of its target minus 1, and predicts a_{j+d-1}, with d drawn from 1..``d_max`` once a row and visit. No
    token sees a register, so the model reads and writes text as it would without them, and they are left away after
    training. loss = (1 - a) mean CE of the tokens + a mean CE of the registers, both over the whole optimiser step.
    A register is an embedding of its own, the only added weight. In a conversation every answer has its registers, and
    none looks beyond it. With ``prompt=bidirectional``, as in the authors' code, whoever uses the model must read
    prompts so too, which ftrun's evaluation does not.
    """

    d_max: int = 4  # furthest token that a register predicts; 1 is the next one
    register_weight: float = 0.3  # weight of the registers' loss (a); 0 is plain training
    prompt: Literal["causal", "bidirectional"] = "causal"  # bidirectional: prompt tokens see each other, in training

    needs: ClassVar[dict[str, str]] = {"token_loss": "adds predictions to a loss that is a mean over tokens"}
    arranges: ClassVar[bool] = True
    perturbs: ClassVar[bool] = True
    dynamic: ClassVar[bool] = True
    whole_step: ClassVar[bool] = True
    packs: ClassVar[bool] = False  # works, but a joined row with a mask of its own costs more than padding

    def __post_init__(self) -> None:
        if self.d_max < 1:
            raise ConfigError(f"tokens.d_max must be at least 1, not {self.d_max}", f"tokens.d_max={self.d_max}")
        if not 0 <= self.register_weight < 1:
            raise ConfigError(
                f"tokens.register_weight is a share from 0 and below 1, not {self.register_weight}",
                f"tokens.register_weight={self.register_weight}",
            )

    def attach(self, bundle: Bundle, ctx: Context) -> nn.Module | None:
        if self.prompt == "bidirectional":
            ctx.report.warn(
                "tokens.prompt=bidirectional: the tokens of a prompt see each other in training; ftrun's own evaluation and generation read prompts causally"
            )
        self._register = LearnedEmbedding(bundle)
        return self._register

    def input_lengths(self, table: TokenTable) -> np.ndarray:
        """Tokens and registers."""
        return table.lengths + table.trained_counts()

    def arrange(self, batch: Batch, seed: tuple[int, int], progress: float) -> Batch:
        if batch.remembered:
            raise ConfigError(
                "mutor puts registers between the tokens, and another token policy remembers numbers of them",
                "tokens=[mutor,...]",
                "Use tokens=mutor alone.",
            )
        rows, time = batch.input_ids.shape
        row, before = batch.predicting
        answer = torch.zeros_like(batch.input_ids, dtype=torch.bool)
        answer[row, before + 1] = True
        # where tokens and registers stand now
        place = torch.arange(time, device=row.device) + answer.cumsum(dim=1)
        tokens = (batch.sequence >= 0).nonzero(as_tuple=True)
        before_token = answer.nonzero(as_tuple=True)  # the token a_j of every register
        registers = (before_token[0], place[before_token] - 1)
        length = int(place[tokens].max()) + 1

        def laid_out(values: Tensor, padding: float, of_registers: Tensor | float) -> Tensor:
            new = values.new_full((rows, length), padding)
            new[tokens[0], place[tokens]] = values[tokens]
            new[registers] = torch.as_tensor(of_registers, dtype=values.dtype, device=values.device)
            return new

        sequence = batch.sequence[before_token]
        ahead = self._offsets(batch, seed)[sequence] - 1  # d - 1 of every register
        last = torch.bincount(batch.sequence[tokens], minlength=batch.sequences)[sequence] - 1
        position = torch.minimum(batch.position_ids[before_token] + ahead - 1, last)
        arranged = replace(
            batch,
            input_ids=laid_out(batch.input_ids, 0, 0),
            loss_weight=laid_out(batch.loss_weight, 0, 0),
            sequence=laid_out(batch.sequence, -1, sequence),
            position_ids=laid_out(batch.position_ids, 0, position),
            added=laid_out(torch.zeros_like(answer), False, True),
        )
        arranged.attention = self._seen(arranged, laid_out(self._in_prompt(batch), False, False))
        # what the registers predict: a_{j+d-1}, where the same answer has it
        answers = (answer & ~self._follows(answer, batch.sequence)).cumsum(dim=1)
        target = (before_token[0], (before_token[1] + ahead).clamp(max=time - 1))
        has = (before_token[1] + ahead < time) & answer[target] & (answers[target] == answers[before_token])
        arranged.own_targets = Targets(
            torch.cat([row, registers[0][has]]),
            torch.cat([place[row, before], registers[1][has]]),
            torch.cat([batch.target_ids, batch.input_ids[target][has]]),
            torch.cat([batch.target_weights, batch.loss_weight[target][has]]),
            torch.cat([batch.target_sequence, sequence[has]]),
        )
        return arranged

    def perturb(self, embeddings: Tensor, batch: Batch, seed: tuple[int, int]) -> Tensor:
        assert batch.added is not None
        return self._register.put(embeddings, batch.added)

    def statistic(self, view: StepView) -> Tensor:
        """Predictions of tokens and of registers, (2,)."""
        registers = self._of_registers(view.batch)
        return torch.stack([(~registers).sum(), registers.sum()]).double()

    def weigh(self, view: StepView) -> Tensor:
        """Each of the two losses becomes a mean over the step, with its share."""
        assert view.step_statistics is not None
        tokens, registers = view.step_statistics.view(-1, 2).sum(dim=0).tolist()
        total = view.counts["loss"]  # what the objective divides by
        a = self.register_weight
        factors = torch.full_like(view.token_nll, (1 - a) * total / max(1.0, tokens))
        return factors.masked_fill_(self._of_registers(view.batch), a * total / max(1.0, registers))

    def _of_registers(self, batch: Batch) -> Tensor:
        """Which predictions are those of registers, (tokens,)."""
        assert batch.added is not None
        return batch.added[batch.predicting]

    def _offsets(self, batch: Batch, seed: tuple[int, int]) -> Tensor:
        """d of every sequence, (sequences,)."""
        drawn = [
            np.random.default_rng([*seed, index]).integers(1, self.d_max + 1) for index in batch.table_index.tolist()
        ]
        return torch.tensor(drawn, device=batch.input_ids.device)

    def _follows(self, answer: Tensor, sequence: Tensor) -> Tensor:
        """Whether the token before belongs to the same answer, (rows, time)."""
        follows = torch.zeros_like(answer)
        follows[:, 1:] = answer[:, :-1] & (sequence[:, 1:] == sequence[:, :-1])
        return follows

    def _in_prompt(self, batch: Batch) -> Tensor:
        """Tokens that see each other: with ``prompt=bidirectional`` those before the first answer, (rows, time)."""
        if self.prompt == "causal":
            return torch.zeros_like(batch.sequence, dtype=torch.bool)
        row, before = batch.predicting
        first = torch.zeros(batch.sequences, dtype=torch.long, device=row.device)
        starts = batch.position_ids[row, before + 1]
        first.scatter_reduce_(0, batch.target_sequence, starts, "amin", include_self=False)
        return (batch.sequence >= 0) & (batch.position_ids < first[batch.sequence.clamp(min=0)])

    def _seen(self, batch: Batch, prompt: Tensor) -> Tensor:
        """Which input (row) sees which (column), (rows, time, time): no register but by itself."""
        assert batch.added is not None
        same = batch.sequence[:, :, None] == batch.sequence[:, None, :]
        earlier = (same & ~batch.added[:, None, :]).tril() | (same & prompt[:, :, None] & prompt[:, None, :])
        return earlier | torch.eye(same.shape[1], dtype=torch.bool, device=same.device)
