"""Classification by mask tokens and label embeddings, without prompts or verbalisers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftrun.adapters.peft_adapter import seeded
from ftrun.data.batches import Batch
from ftrun.errors import ConfigError, DataError
from ftrun.models.architecture import Architecture
from ftrun.objectives.base import Kind, Objective
from ftrun.registry import register
from ftrun.training.parts import Loss
from ftrun.training.view import StepView

if TYPE_CHECKING:
    from ftrun.config.settings import Settings
    from ftrun.models.bundle import Bundle
    from ftrun.training.context import Context

DEVIATION = 1e-4  # of the label embeddings at the start


class LabelEmbeddings(nn.Module):
    """E (masks, labels, width) as ``rate * weight``: under Adam, E then learns ``rate`` times as fast as other weights."""

    def __init__(self, masks: int, labels: int, width: int, rate: float):
        super().__init__()
        self.rate = rate
        self.weight = nn.Parameter(torch.randn(masks, labels, width) * DEVIATION / rate)

    def forward(self, states: Tensor) -> Tensor:
        """Logits (rows, masks, labels) of the states at the masks, (rows, masks, width)."""
        return torch.einsum("bkw,kcw->bkc", states.float(), self.rate * self.weight)


@register("objective", "perfect")
@dataclass
class Perfect(Objective):
    """Prompt-free few-shot classification (Karimi Mahabadi et al., 2022, arXiv:2204.01172).

    ``masks`` mask tokens stand behind a text, or between two. ``s_c = h_i . E[i, c]`` is the score of label c at mask
    i, whose last hidden state is ``h_i``. The loss is ``sum_{c != gold} max(0, margin - s_gold + s_c) / labels``, a
    mean over masks and rows. The label embeddings E are thrown away: eval=prototypes predicts from the states alone.
    A model without mask tokens gets its end-of-text token as many times, at the end.
    """

    lacks: ClassVar[dict[str, str]] = {"token_loss": "has one loss a row"}
    kind: ClassVar[Kind] = "labels"

    masks: int = 2  # mask tokens (k)
    mask_token: str | None = None  # a token for the masks; null: the tokenizer's mask token, else its end of text
    margin: float = 1.0  # by which the right label should win
    label_rate: float = 10.0  # learning rate of the label embeddings, over that of the rest

    def __post_init__(self) -> None:
        if self.masks < 1 or self.margin <= 0 or self.label_rate <= 0:
            raise ConfigError(
                "objective.masks is at least 1, objective.margin and objective.label_rate are above 0",
                f"objective.masks={self.masks} objective.margin={self.margin:g} objective.label_rate={self.label_rate:g}",
            )

    def check(self, settings: Settings) -> None:
        super().check(settings)
        if settings.task != "classify":
            raise ConfigError("objective=perfect classifies", f"task={settings.task}", "Add task=classify.")
        if settings.choice("tokens") != "none":
            raise ConfigError(
                "objective=perfect puts masks into the rows itself, and has no token losses to weigh",
                f"tokens={settings.choice('tokens')}",
                "Use tokens=none.",
            )

    def attach(self, bundle: Bundle, ctx: Context) -> nn.Module:
        config: Any = bundle.model.config
        self.mask_id(bundle)
        self._bundle = bundle
        with seeded(ctx.seed):
            self.embeddings = LabelEmbeddings(self.masks, config.num_labels, bundle.architecture.width, self.label_rate)
        return self.embeddings

    def count(self, batch: Batch) -> float:
        return float(batch.rows)

    def loss(self, view: StepView) -> Loss:
        gold = view.batch.label
        s = self.embeddings(self.states(replace(self._bundle, model=view.model), view.batch))
        hinge = F.multi_margin_loss(
            s.flatten(0, 1), gold.repeat_interleave(self.masks), margin=self.margin, reduction="sum"
        )
        right = (s.sum(dim=1).argmax(dim=-1) == gold).float().sum()
        return Loss(hinge / self.masks, {"accuracy": right})

    def states(self, bundle: Bundle, batch: Batch) -> Tensor:
        """Last hidden states at the masks that are put into the batch, (rows, masks, width)."""
        masked, places = with_masks(batch, self.mask_id(bundle), self.masks, bundle.tokenizer.sep_token_id)
        longest = int((masked.sequence >= 0).sum(dim=1).max())
        if longest > bundle.context_length:
            raise DataError(
                f"a row of {longest - self.masks} tokens leaves no room for {self.masks} masks within the {bundle.context_length} tokens of the model",
                "data.max_length",
                f"Use data.max_length={bundle.context_length - self.masks} or less.",
            )
        architecture: Architecture = bundle.architecture
        states = architecture.hidden_states(bundle.model, masked)
        return states[torch.arange(len(places), device=places.device)[:, None], places]

    def mask_id(self, bundle: Bundle) -> int:
        """The token that stands for a mask. Raises ConfigError where ``mask_token`` is not one token."""
        tokenizer = bundle.tokenizer
        if self.mask_token is None:
            found = tokenizer.mask_token_id
            found = tokenizer.eos_token_id if found is None else found
            if found is None:
                raise ConfigError(
                    "the tokenizer has neither a mask token nor one for the end of a text",
                    f"model.path={bundle.path}",
                    "Name a token with objective.mask_token.",
                )
            return found
        ids = tokenizer(self.mask_token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ConfigError(
                f'"{self.mask_token}" is {len(ids)} tokens of this tokenizer',
                f"objective.mask_token={self.mask_token}",
                "Name one token.",
            )
        return int(ids[0])


def with_masks(batch: Batch, mask_id: int, masks: int, separator: int | None) -> tuple[Batch, Tensor]:
    """The batch (a row a sequence) with masks before the first separator, or else behind its last token.

    And their places, (rows, masks).
    """
    ids, time = batch.input_ids, batch.input_ids.shape[1]
    real = batch.sequence >= 0
    ends = real.sum(dim=1)
    found = ids == separator if separator is not None else torch.zeros_like(real)
    is_end = found & real
    start = torch.where(is_end.any(dim=1), is_end.long().argmax(dim=1), ends)[:, None]
    position = torch.arange(time + masks, device=ids.device).expand(len(ids), -1)
    source = torch.where(position < start, position, position - masks).clamp(0, time - 1)
    new = (position >= start) & (position < start + masks)
    inside = position < (ends[:, None] + masks)
    own = batch.sequence.amax(dim=1, keepdim=True)
    masked = replace(
        batch,
        input_ids=ids.gather(1, source).masked_fill(new, mask_id),
        loss_weight=torch.zeros(position.shape, device=ids.device),
        sequence=torch.where(inside, own, -1),
        position_ids=position,
    )
    return masked, start + torch.arange(masks, device=ids.device)
