"""Training that goes on from a finished run: which base, which adapter, and what cannot go together."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path

from ftrun.config.compose import Composed
from ftrun.config.keys import names
from ftrun.config.place import place
from ftrun.config.saved import CONFIG, load_settings
from ftrun.config.settings import Settings
from ftrun.errors import ConfigError


def go_on(composed: Composed, named: Collection[str]) -> None:
    """Make the run in ``run=``, or the one that ``model.path`` names, the start of this one: its base and its adapter.

    A run of full weights is a model like any other. ``named``: the keys of the command line. Raises ConfigError where
    the base, the adapter or the task is another one.
    """
    settings = composed.settings
    if settings.resume and "recipe" not in named:
        return  # the settings are those of a run that has settled this
    mine = _run_in(settings.model.path)
    if settings.run and mine and mine.resolve() != place(settings.run, "run").resolve():
        raise ConfigError(
            "run= and model.path name two runs", f"run={settings.run} model.path={settings.model.path}", "Name one."
        )
    if not settings.run and not mine:
        return
    run, own = load_settings(settings.run or mine)
    if not (run / "adapter").is_dir() and not (run / "model").is_dir():
        raise ConfigError(f"{run} holds no trained model", f"run={run}", f"Finish it: ftrun train resume={run}.")
    settings.run = str(run)
    if settings.task != own.task:
        raise ConfigError(f"{run} is a run of task={own.task}", f"task={settings.task}", f"Use task={own.task}.")
    if not mine:
        _check_base(composed, own, named)
    kept = {key: value for key, value in asdict(settings.model).items() if f"model.{key}" in named and key != "path"}
    settings.model = replace(own.model, **kept)
    if not (run / "adapter").is_dir():
        settings.model.path, settings.model.revision = str(run / "model"), None
        return
    _take_adapter(composed, own, named)
    if settings.selects and "select" in settings.stages and settings.select.model_path is None:
        raise ConfigError(
            "a selection scores with plain weights, and the model of this run is an adapter on its base",
            f"run={run}",
            f"Merge it, ftrun merge run={run}, and give model.path={run / 'model'}; or name a model with select.model.path.",
        )


def adapter_of(settings: Settings) -> Path | None:
    """The run whose adapter is trained further; None where training starts from a model."""
    run = Path(settings.run) if settings.run else None
    return run if run and settings.model.path != str(run / "model") else None


def _run_in(path: str) -> Path | None:
    """The run that a folder is, or whose adapter it is."""
    folder = place(path, "model.path")
    for here in (folder, folder.parent) if folder.name == "adapter" else (folder,):
        if (here / CONFIG).is_file():
            return here
    return None


def _check_base(composed: Composed, own: Settings, named: Collection[str]) -> None:
    settings, recipe = composed.settings, composed.recipe
    said = names(named, "model.path", "model.revision") or "model" in named
    if not said and not (recipe and recipe.sets("model.path")):
        return
    if (settings.model.path, settings.model.revision) != (own.model.path, own.model.revision):
        raise ConfigError(
            f"{settings.run} stands on {own.model.path}, not on {settings.model.path}",
            f"run={settings.run} model.path={settings.model.path}",
            "Leave model.path out: the run names its base.",
        )


def _take_adapter(composed: Composed, own: Settings, named: Collection[str]) -> None:
    """Give this run the adapter of the other, with its knobs."""
    settings = composed.settings
    (name, knobs), (its_name, its_knobs) = settings.slots["adapter"], own.slots["adapter"]
    merge = f"Merge it, ftrun merge run={settings.run}, and give model.path={Path(settings.run or '') / 'model'}."
    if name != its_name:
        raise ConfigError(
            f"{settings.run} has trained adapter={its_name}, and adapter={name} cannot go on from that",
            f"run={settings.run} adapter={name}",
            f"Use adapter={its_name}. Or start anew on its weights: {merge}",
        )
    for key, value in knobs.items():
        if names(named, f"adapter.{key}") and value != its_knobs[key]:
            raise ConfigError(
                f"the adapter of {settings.run} has {key}={its_knobs[key]}, and that cannot change",
                f"adapter.{key}={value}",
                f"Leave adapter.{key} out. Or start anew on its weights: {merge}",
            )
    changed = [key for key in knobs if knobs[key] != its_knobs[key]]
    if changed:
        said = ", ".join(f"{key}={its_knobs[key]}" for key in changed)
        composed.notes.append(f"the adapter is that of {settings.run}, with its {said}")
    settings.slots["adapter"] = (its_name, copy.deepcopy(its_knobs))
