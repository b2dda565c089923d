"""What the selections of one command have in common."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ftrun.runs.artifacts import digest
from ftrun.select.content import Content
from ftrun.training.scoring import Scoring

if TYPE_CHECKING:
    from ftrun.config.settings import Settings


@dataclass
class Shared:
    """What the selections of one command have in common, which is therefore computed once."""

    shards: Path
    content: Content
    engines: dict[str, Scoring] = field(default_factory=dict)  # one a scoring model

    def engine(self, settings: Settings, made: Scoring) -> Scoring:
        """The engine for this scoring model, ``made`` if it is the first; what belongs to one selection is empty in it."""
        first = self.engines.setdefault(
            scoring_model(settings), replace(made, shards=self.shards, load=cache(made.load))
        )
        return replace(first, reasons={}, embeddings=None, similarity=None)


def scoring_model(settings: Settings) -> str:
    """Hash of the settings that decide which model scores."""
    plain = settings.as_dict()
    path = settings.select.model_path
    own = (
        [plain["model"], plain["quant"], settings.task]
        if path is None
        else [settings.model.dtype, settings.model.template]
    )
    return digest([path, own, settings.select.batch_tokens])
