"""Verbs: what a checked config is used for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftrun.config.capabilities import slots_at_work
from ftrun.errors import ConfigError, nearest

if TYPE_CHECKING:
    from ftrun.config.compose import Composed
    from ftrun.config.settings import Settings

CHAIN_VERBS = ("train", "select")


def run_verb(verb: str, composed: Composed, overrides: Sequence[str], html: bool = False) -> dict[str, Any] | None:
    """Carry out ``verb``. Raises FtrunError."""
    if verb in (*CHAIN_VERBS, "plan", "preview"):
        check_command(verb, composed, overrides)
    if verb in CHAIN_VERBS:
        return _run_chain(verb, composed, list(overrides))
    if verb == "show":
        from ftrun.reporting.catalogue import print_show

        return print_show(composed, list(overrides))
    from ftrun.runs.memory import memory_guard

    with memory_guard(
        f"ftrun {verb} was at work", "Use a smaller model, model.dtype=bfloat16, or fewer tokens at a time."
    ):
        return _work(verb, composed, overrides, html)


def check_command(verb: str, composed: Composed, overrides: Sequence[str]) -> None:
    """What is refused of a chain before anything is read or written. Raises ConfigError."""
    if verb != "select":
        from ftrun.config import keys
        from ftrun.config.ancestor import go_on

        go_on(composed, keys.named(overrides))
    _check_parts(verb, composed)
    settings = composed.settings
    if settings.recipe is not None or settings.resume or verb not in CHAIN_VERBS:
        return
    if settings.choice("select") == "none" if verb == "select" else not settings.run:
        raise ConfigError("which recipe?", f"ftrun {verb}", "Add recipe=NAME; `ftrun recipes` lists them.")


def check_together(methods: Sequence[Composed]) -> Settings:
    """What a selection by several recipes as a whole goes by. Raises ConfigError."""
    for composed in methods:
        _check_parts("select", composed)
    return replace(methods[0].settings, recipe=",".join(str(one.settings.recipe) for one in methods))


def _check_parts(verb: str, composed: Composed) -> None:
    """Let the components that will be at work look at the whole config."""
    settings = composed.settings
    at_work = slots_at_work(verb, settings.stages)
    for slot in ("adapter", "objective"):
        if slot in at_work:
            settings.component(slot).check(settings)
    for slot in settings.slots:  # each refuses knobs that it cannot work with
        settings.component(slot)
    settings.evaluators()


def _work(verb: str, composed: Composed, overrides: Sequence[str], html: bool) -> dict[str, Any] | None:
    if verb == "preview":
        from ftrun.verbs.preview import preview

        return preview(composed, html)
    if verb == "plan":
        from ftrun.verbs.plan import plan

        return plan(composed)
    if verb == "eval":
        from ftrun.verbs.evaluate import evaluate

        return evaluate(composed, list(overrides))
    if verb == "merge":
        from ftrun.verbs.merge import merge

        return merge(composed, overrides)
    if verb == "generate":
        from ftrun.verbs.generate import generate

        return generate(composed)
    raise ConfigError(
        f'there is no verb "{verb}"',
        todo=nearest(verb, (*CHAIN_VERBS, "show", "preview", "plan", "eval", "merge", "generate")),
    )


def run_together(methods: Sequence[Composed], overrides: Sequence[str]) -> dict[str, Any]:
    """Select by several recipes in one run. Raises FtrunError."""
    from ftrun.config import keys
    from ftrun.runs.artifacts import new_run_folder
    from ftrun.training import launch
    from ftrun.training.foreign import join

    settings = check_together(methods)
    settings.out = settings.out or settings.resume or str(new_run_folder("several", settings.as_dict()))
    join(settings.launch, keys.named(overrides))
    if settings.launch.processes * settings.launch.nodes > 1 and not launch.is_worker():
        return _run_processes("select", settings, list(overrides))
    from ftrun.stages.many import select_together

    return select_together(settings, methods, ["ftrun", "select", *overrides])


def _run_chain(verb: str, composed: Composed, overrides: list[str]) -> dict[str, Any]:
    from ftrun.config import keys
    from ftrun.training import launch
    from ftrun.training.foreign import join

    settings = composed.settings
    if verb == "train" and settings.resume and settings.stages == ["select"]:
        from ftrun.config.settings import RootConfig

        if not keys.names(keys.named(overrides), "stages"):
            settings.stages = RootConfig().stages  # the selection of `ftrun select` is trained on
    join(settings.launch, keys.named(overrides))
    if settings.launch.processes * settings.launch.nodes > 1 and not launch.is_worker():
        return _run_processes(verb, settings, overrides)
    from ftrun.stages.chain import run

    return run(composed, verb, ["ftrun", verb, *overrides])


def _run_processes(verb: str, settings: Settings, overrides: list[str]) -> dict[str, Any]:
    """Start the processes with the same overrides and one run folder, and hand their outcome on."""
    from ftrun.runs.artifacts import new_run_folder
    from ftrun.training import launch

    words = [word for word in overrides if not word.startswith("out=")]
    fresh = None if settings.resume else settings.out or str(new_run_folder(settings.recipe, settings.as_dict()))
    out = launch.spawn(["-m", "ftrun", verb, *words], settings.launch, fresh) or settings.resume
    summary: dict[str, Any] = json.loads((Path(str(out)) / "summary.json").read_text())
    return summary
