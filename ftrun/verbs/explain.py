"""``ftrun select explain``: why one row was kept or left out, from the run folder and the pool alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from ftrun.config.explain import parse
from ftrun.config.saved import load_settings
from ftrun.data.pool import Pool, load_pool
from ftrun.errors import ConfigError, DataError, nearest
from ftrun.reporting.choice import KEYS as KEYS_OF_ROWS
from ftrun.reporting.rows import prompt_and_response
from ftrun.reporting.run import Run
from ftrun.reporting.selection_facts import Choice, read_choices
from ftrun.reporting.weights import token_text
from ftrun.runs import numbers
from ftrun.runs.artifacts import cache_dir, strict
from ftrun.select.content import BAG, EMBEDDING, Vocabulary, text_of, unit

KEYS = ("run", "id", "recipe")
NEIGHBOURS = 5  # nearest chosen rows
COMPARED = 50_000  # chosen rows that are compared word by word, the best first
SHOWN = 300  # characters of a text in the terminal
TOP_TOKENS = 12  # tokens shown in the terminal, those with the highest scores


def explain(overrides: Sequence[str], quiet: bool = False) -> dict[str, Any]:
    """Say why the row ``id=`` of ``run=`` was chosen or not, by every recipe of the run or by ``recipe=``.

    Raises ConfigError for a run without a selection, DataError for a row that the pool does not have.
    """
    asked = _read(overrides)
    out, id = Path(asked["run"]), asked["id"]
    choices = _choices(out, asked.get("recipe"))
    _, settings = load_settings(choices[0].run.path)
    pool = load_pool(settings.data, cache_dir() / "data", settings.seed)
    if id not in pool.ids:
        left_out = ", without those that data.unfit=drop leaves out" if len(pool) < len(pool.index) else ""
        todo = f"The pool has the rows 0 to {pool.ids.max():,}{left_out}."
        raise DataError(f"there is no row {id}", f"id={id}", todo)
    notes = []
    said = Run(out).lock.get("fingerprints")
    if isinstance(said, dict) and said.get("data") not in (None, pool.fingerprint):
        notes.append("the data has changed since this run: texts and neighbours may be those of other rows")
    prompt, response = prompt_and_response(pool.fields(id))
    row = {"prompt": prompt, "response": response, "origin": pool.origin(id), "source": pool.fields(id).get("source")}
    methods = {choice.name: explain_row(choice, id, pool) for choice in choices}
    found: dict[str, Any] = strict({"run": str(out), "id": id, "row": row, "notes": notes, "methods": methods})
    if not quiet:
        _print(found, Console(highlight=False))
    return found


def _read(overrides: Sequence[str]) -> dict[str, Any]:
    asked: dict[str, Any] = {}
    for override in parse(overrides):
        key = override.key_or_group
        if key not in KEYS:
            raise ConfigError(f'explain has no key "{key}"', str(override.input_line), nearest(key, KEYS))
        asked[key] = override.value()
    for key in ("run", "id"):
        if asked.get(key) is None:
            raise ConfigError(f"which {key}?", "ftrun select explain", "Write: ftrun select explain run=RUN id=17")
    if not isinstance(asked["id"], int):
        raise ConfigError("id takes the number of a row", f"id={asked['id']}", "The first row is id=0.")
    return asked | {"run": str(asked["run"])}


def _choices(out: Path, recipe: str | None) -> list[Choice]:
    if not (out / "config.yaml").exists():
        raise ConfigError(f"there is no run in {out}", f"run={out}", "Give the folder that holds config.yaml.")
    choices = [choice for choice in read_choices(out) if "id" in choice.run.scores]
    if not choices:
        raise ConfigError(f"{out} selected nothing", f"run={out}", "Give a run of `ftrun select`.")
    if recipe is None:
        return choices
    chosen = [choice for choice in choices if choice.name == recipe]
    if not chosen:
        todo = nearest(recipe, [choice.name for choice in choices])
        raise ConfigError(f'"{recipe}" did not select in this run', f"recipe={recipe}", todo)
    return chosen


def explain_row(choice: Choice, id: int, pool: Pool) -> dict[str, Any]:
    """What one method made of a row."""
    found = np.flatnonzero(choice.ids == id)
    if not len(found):
        return {"selected": False, "why": "it was held out for evaluation and took no part"}
    at = int(found[0])
    scores = {
        name: {"value": float(values[at]), "percentile": percentile(values.astype(float), at)}
        for name, values in choice.run.scores.items()
        if values.dtype.kind == "f" and name not in KEYS_OF_ROWS
    }
    better = choice.eligible & (choice.score > choice.score[at])
    reason = choice.run.audit["reason"][at]
    cluster = int(choice.cluster[at])
    same = choice.cluster == cluster
    return {
        "selected": bool(choice.picked[at]),
        "why": why(choice, at),
        "ranked_by": choice.column,
        "scores": scores,
        "rank": int(choice.rank[at]) if choice.picked[at] else None,
        "picked": int(choice.picked.sum()),
        "place_by_score": int(better.sum()) + 1 if np.isfinite(choice.score[at]) else None,
        "cutoff": choice.cutoff,
        "distance_to_cutoff": float(choice.score[at] - choice.cutoff),
        "no_score_because": reason,
        "admitted": bool(choice.admitted[at]),
        "near_duplicate_of": int(choice.repeats[at]) if np.isfinite(choice.repeats[at]) else None,
        "tokens": float(choice.tokens[at]),
        "cluster": None
        if cluster < 0
        else {
            "number": cluster,
            "by": choice.clustered_by,
            "words": choice.cluster_names[cluster],
            "rows": int(same.sum()),
            "picked": int((same & choice.picked).sum()),
        },
        "nearest_chosen": nearest_chosen(choice, at, pool),
        "token_scores": _tokens(choice, id),
    }


def percentile(values: np.ndarray, at: int) -> float:
    """Share of the scored rows that score lower, ties counted half, in percent; NaN for a row without a score."""
    if not np.isfinite(values[at]):
        return float("nan")
    others = np.delete(values, at)
    others = others[np.isfinite(others)]
    if not len(others):
        return 50.0
    return float(100 * ((others < values[at]).sum() + 0.5 * (others == values[at]).sum()) / len(others))


def why(choice: Choice, at: int) -> str:
    """The reason in one sentence without its subject."""
    score, column, count = choice.score[at], choice.column, int(choice.picked.sum())
    reason = choice.run.audit["reason"][at]
    if choice.picked[at]:
        last = ", although it has no score (select.unscored=keep)" if reason is not None else ""
        return f"it was chosen: number {int(choice.rank[at]):,} of {count:,}{last}"
    if reason is not None:
        return f"it was left out: it has no score, because {reason}"
    if not choice.admitted[at]:
        return f"it was left out by the filter of select={choice.run.selection.get('select')}, before any picking"
    if np.isfinite(choice.repeats[at]):
        return f"it was left out as a near-duplicate of row {int(choice.repeats[at])}"
    picker = choice.run.selection.get("picker")
    if column and score < choice.cutoff:
        between = int((choice.eligible & ~choice.picked & (choice.score > score)).sum())
        return (
            f"it was left out: its {column} {numbers.plain(float(score))} lies {numbers.plain(float(choice.cutoff - score))} "
            f"below the lowest that was chosen, {between:,} rows that were left out score higher"
        )
    if column and score == choice.cutoff:
        return f"it was left out: its {column} equals the lowest that was chosen, and the budget was spent"
    return f"it was left out by picker={picker}, which looks at more than the score, or whose budget was spent"


def nearest_chosen(choice: Choice, at: int, pool: Pool) -> dict[str, Any]:
    """The chosen rows that are most like a row: by stored embeddings, else by their words."""
    order = np.flatnonzero(choice.picked)
    order = order[np.argsort(choice.rank[order], kind="stable")]
    chosen = order[order != at]
    file = choice.run.path / choice.run.selection_in / "embeddings.npy"
    if file.exists():
        stored = np.load(file, mmap_mode="r", allow_pickle=False)
        nearness, by = (unit(stored[chosen]) @ unit(stored[at : at + 1])[0]).astype(float), EMBEDDING
    else:
        chosen = chosen[:COMPARED]
        texts = [text_of(pool[int(choice.ids[place])]) for place in (at, *chosen.tolist())]
        nearness, by = Vocabulary.of(texts).bags(texts).nearness(0)[1:], BAG
    rows = []
    for best in np.argsort(-nearness, kind="stable")[:NEIGHBOURS].tolist():
        id = int(choice.ids[chosen[best]])
        prompt, response = prompt_and_response(pool.fields(id))
        rows.append({"id": id, "cosine": float(nearness[best]), "prompt": prompt, "response": response})
    return {"by": by, "rows": rows}


def _tokens(choice: Choice, id: int) -> list[dict[str, Any]]:
    columns = choice.run.scored_tokens([id]) or choice.run.token_rows([id])
    if not {"position", "token"} <= columns.keys():
        return []
    return [
        {
            "position": int(columns["position"][line]),
            "token": token_text(columns["token"][line], choice.run.tokenizer),
            **{name: float(columns[name][line]) for name in ("score", "weight") if name in columns},
        }
        for line in np.argsort(columns["position"], kind="stable")
    ]


# ---- the terminal ----


def _print(found: dict[str, Any], console: Console) -> None:
    row = found["row"]
    source = f" · {row['source']}" if row["source"] else ""
    console.print(Text.assemble((f"row {found['id']}", "bold"), (f"  {row['origin']}{source}", "dim")))
    console.print(Text(_short(row["prompt"]), "dim"), Text(_short(row["response"])), sep="\n", soft_wrap=True)
    for note in found["notes"]:
        console.print(Text(f"warning: {note}", "yellow"))
    for name, method in found["methods"].items():
        _print_method(name, method, console)


def _print_method(name: str, method: dict[str, Any], console: Console) -> None:
    colour = "green" if method["selected"] else "yellow"
    console.print(Text.assemble("\n", (name, "bold"), "  ", (method["why"], colour)), soft_wrap=True)
    if "scores" not in method:
        return
    for column, score in method["scores"].items():
        if score["value"] is not None:
            place = f"above {score['percentile']:.0f}% of the rows that have one"
            console.print(f"  {column:<16} {numbers.plain(score['value']):>10}  {place}", soft_wrap=True)
    if method["ranked_by"] and method["cutoff"] is not None:
        behind = method["distance_to_cutoff"]
        side = (
            "" if behind is None else f", {numbers.plain(abs(behind))} {'below' if behind >= 0 else 'above'} this row"
        )
        place = f"; place {method['place_by_score']:,} by score" if method["place_by_score"] else ""
        console.print(
            f"  {'cut-off':<16} {numbers.plain(method['cutoff']):>10}  lowest that was chosen{side}{place}",
            soft_wrap=True,
        )
    cluster = method["cluster"]
    words = "not among the rows whose words were read"
    if cluster:
        words = f"{cluster['words']}: {cluster['rows']:,} rows, {cluster['picked']:,} chosen (k-means, {cluster['by']})"
    console.print(Text(f"  {'topic':<16} {words}"), soft_wrap=True)
    near = method["nearest_chosen"]
    if near["rows"]:
        console.print(f"  nearest chosen rows, by {near['by']}")
        for one in near["rows"]:
            console.print(
                Text(f"    {one['cosine']:.2f}  row {one['id']:<7} {_short(one['prompt'], 90)}"), soft_wrap=True
            )
    _print_tokens(method["token_scores"], console)


def _print_tokens(tokens: list[dict[str, Any]], console: Console) -> None:
    scored = [token for token in tokens if token.get("score") is not None]
    if not scored:
        return
    highest = sorted(scored, key=lambda token: -token["score"])[:TOP_TOKENS]
    words = "  ".join(f"{token['token']!r} {numbers.plain(token['score'])}" for token in highest)
    console.print(Text(f"  highest of {len(scored):,} token scores: {words}"), soft_wrap=True)


def _short(text: str, limit: int = SHOWN) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"
