"""What a running component may ask for: the settings, the run folder, the other processes, and the user's ear."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftrun.config.settings import Settings
    from ftrun.data.pool import Pool
    from ftrun.data.tokens import TokenTable
    from ftrun.models.bundle import Bundle
    from ftrun.training.distributed import Team
    from ftrun.training.progress import Reporter


@dataclass
class Context:
    settings: Settings
    out: Path  # the run folder
    team: Team  # the processes of this run: rank, world_size, barrier, all_reduce, gather
    report: Reporter  # progress and messages for people, on standard error and in ftrun.log
    bundle: Bundle | None = None  # the run's model; a stage that needs it loads it through chain.py
    heldout: Pool | None = None  # rows kept for evaluation
    heldout_tokens: TokenTable | None = None
    train_pool: Pool | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # what ends in lock.json and the report

    @property
    def seed(self) -> int:
        return self.settings.seed


def cache_dir() -> Path:
    """Where converted models, tokenised data and stage outputs are kept between runs."""
    return Path(os.environ.get("FTRUN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ftrun")
