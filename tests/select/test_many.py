"""Several recipes in one command, and the explanation of single rows."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from ftrun import cli
from ftrun.config import compose
from ftrun.data import pool as pools
from ftrun.errors import ConfigError
from ftrun.stages.many import agreed
from ftrun.training.scoring import Scoring

pytestmark = pytest.mark.slow  # whole runs, one after the other

FILES = ("scores.parquet", "selected.jsonl", "lengths.parquet", "audit.parquet", "summary.json", "config.yaml")


@pytest.fixture
def select(tiny_dir, rows_file, tmp_path, capsys):
    def run(recipe, *words, out="run", code=0):
        folder = tmp_path / out
        asked = ["select", f"recipe={recipe}", f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={folder}"]
        assert cli.entry([*asked, *words]) == code, capsys.readouterr().err
        return folder

    return run


def test_one_pool_one_engine_and_the_usual_files(select, monkeypatch, capsys):
    loads, reads, computed = [], [], []
    load, compute = Scoring.bundle.func, Scoring._compute  # type: ignore[attr-defined]
    read = pools.load_pool

    def counted(self, texts, name, measure, keys, places, packed):
        computed.extend(keys)
        return compute(self, texts, name, measure, keys, places, packed)

    monkeypatch.setattr(Scoring, "_compute", counted)
    monkeypatch.setattr("ftrun.stages.rows.load_pool", lambda *given: reads.append(1) or read(*given))
    monkeypatch.setattr("ftrun.stages.attach.load_bundle", _counting("ftrun.stages.attach.load_bundle", loads))
    out = select("ifd,superfiltering,longest", "budget=6", "select.template=plain", code=2)
    assert "recipe longest: there is no key" in capsys.readouterr().err
    out = select("superfiltering,ifd,longest", "budget=6", "--json")
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["status"] == "done" and list(summary["selections"]) == ["superfiltering", "ifd", "longest"]
    assert len(reads) == 1 and len(loads) == 1 and load
    assert len(computed) == len(set(computed)) > 0
    assert not (out / "selection" / "shards").exists()
    joined = pq.read_table(out / "selection" / "scores.parquet")
    for name in ("superfiltering", "ifd", "longest"):
        folder = out / "selection" / name
        assert all((folder / file).is_file() for file in FILES)
        alone = pq.read_table(folder / "scores.parquet")
        for column in alone.column_names[1:]:
            assert joined[f"{name}.{column}"].equals(alone[column])
        assert summary["selections"][name]["picked"] == sum(alone["selected"].to_pylist()) > 0
    assert joined["id"].to_pylist() == list(range(24))
    assert (out / "selection" / "report.html").is_file() and (out / "report.html").is_file()


def _counting(path, calls):
    import importlib

    module, name = path.rsplit(".", 1)
    original = getattr(importlib.import_module(module), name)

    def counted(*given, **named):
        calls.append(1)
        return original(*given, **named)

    return counted


def test_together_as_alone(select, monkeypatch, tmp_path):
    """A recipe chooses the same rows with the same scores, with others or by itself."""
    together = select("superfiltering,random", "budget=0.25", out="both") / "selection"
    for name in ("superfiltering", "random"):
        monkeypatch.setenv("FTRUN_CACHE", str(tmp_path / f"cache-{name}"))
        alone = select(name, "budget=0.25", out=name) / "selection"
        for file in ("scores.parquet", "selected.jsonl", "audit.parquet"):
            assert (alone / file).read_bytes() == (together / name / file).read_bytes()


@pytest.mark.parametrize(
    ("words", "what", "todo"),
    [
        (["recipe=superfiltering,longest", "select.ratio=loss"], "recipe longest: there is no key", "superfiltering"),
        (["recipe=longest,random,longest"], "recipe longest is named twice", "once"),
        (["recipe=random,lora_sft"], "recipe lora_sft selects no rows", "Leave it out"),
        (["recipe=random,longst"], 'there is no recipe "longst"', '"longest"'),
        (["recipe=random,longest", "budget=-3"], "budget", ""),
    ],
)
def test_what_does_not_fit_all_is_refused(words, what, todo):
    with pytest.raises(ConfigError) as refused:
        compose.load_each(words)
    assert what in str(refused.value) and todo in str(refused.value)


def test_an_override_that_all_take_is_fine():
    methods = compose.load_each(["recipe=superfiltering,ifd", "select.max_length=99", "seed=3"])
    assert [one.settings.component("select").max_length for one in methods] == [99, 99]


def test_train_wants_one_recipe(capsys):
    assert cli.entry(["train", "recipe=random,longest"]) == 2
    assert "recipe has several values" in capsys.readouterr().err


def test_agreed_keeps_what_is_equal():
    one = {"a": 1, "b": {"c": 1, "d": 2}, "e": {}, "f": 1}
    assert agreed([one, {"a": 2, "b": {"c": 1, "d": 3}, "e": {}}]) == {"b": {"c": 1}, "e": {}}


def test_a_resumed_run_scores_nothing_twice(select, monkeypatch, capsys):
    out = select("superfiltering,random", "budget=6")
    before = (out / "selection" / "scores.parquet").read_bytes()
    monkeypatch.setattr(Scoring, "_run", lambda *_: pytest.fail("scored again"))
    assert select("superfiltering,random", "budget=6", f"resume={out}") == out
    assert (out / "selection" / "scores.parquet").read_bytes() == before
    assert select("superfiltering,longest", "budget=6", f"resume={out}", code=2)


# ---- explain ----


def explained(out, id, capsys, *words):
    capsys.readouterr()
    assert cli.entry(["select", "explain", f"run={out}", f"id={id}", *words, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_explain_says_what_the_files_say(select, capsys):
    out = select("superfiltering,longest", "budget=6")
    for name, column in (("superfiltering", "ifd"), ("longest", "tokens")):
        table = pq.read_table(out / "selection" / name / "scores.parquet").to_pydict()
        score, picked = np.array(table[column]), np.array(table["selected"])
        cutoff = score[picked].min()
        for id in range(0, 24, 5):
            method = explained(out, id, capsys)["methods"][name]
            assert method["selected"] == picked[id] and method["rank"] == table["rank"][id]
            assert method["scores"][column]["value"] == score[id]
            assert method["cutoff"] == cutoff
            assert method["distance_to_cutoff"] == pytest.approx(score[id] - cutoff)
            lower, equal = (score < score[id]).sum(), (score == score[id]).sum() - 1
            assert method["scores"][column]["percentile"] == pytest.approx(100 * (lower + equal / 2) / 23)
            near = [row["id"] for row in method["nearest_chosen"]["rows"]]
            assert len(near) == 5 and set(near) <= set(np.flatnonzero(picked)) - {id}
            assert method["nearest_chosen"]["by"] == "hashed bag of words"
            assert method["cluster"]["rows"] >= 1 and method["token_scores"] == []


def test_explain_reads_in_the_terminal(select, capsys):
    out = select("longest", "budget=6")
    table = pq.read_table(out / "selection/scores.parquet").to_pydict()
    capsys.readouterr()
    left = table["selected"].index(False)
    assert cli.entry(["select", "explain", f"run={out}", f"id={left}"]) == 0
    printed = capsys.readouterr().out
    assert "it was left out: its tokens" in printed and f"what is {left} plus" in printed
    assert "nearest chosen rows, by hashed bag of words" in printed and "topic" in printed
    chosen = table["rank"].index(1)
    assert explained(out, chosen, capsys)["methods"]["longest"]["why"] == "it was chosen: number 1 of 6"


def test_explain_gives_the_reason_for_no_score(tiny_dir, tmp_path, capsys):
    rows = [{"prompt": f"what is {i}", "completion": f"answers: {i} yes"} for i in range(8)]
    file = tmp_path / "pool.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "one", "completion": "a"}]))
    words = [f"model.path={tiny_dir}", f"data.path={file}", f"out={tmp_path / 'run'}", "picker=threshold"]
    assert cli.entry(["select", "select=superfiltering", "select.picker.minimum=0", *words]) == 0
    method = explained(tmp_path / "run", 8, capsys)["methods"]["superfiltering"]
    assert method["no_score_because"] == "a one-token response has no direct loss"
    assert "it has no score" in method["why"] and method["scores"]["ifd"]["value"] is None


def test_explain_uses_stored_embeddings_and_token_scores(select, capsys):
    import pyarrow as pa

    out = select("longest", "budget=6")
    folder = out / "selection"
    vectors = np.random.default_rng(0).standard_normal((24, 4)).astype(np.float16)
    np.save(folder / "embeddings.npy", vectors)
    columns = {"id": [3, 3, 4], "position": [0, 1, 0], "token": ["yes", "no", "fox"], "score": [0.5, 2.0, 1.0]}
    pq.write_table(pa.table(columns | {"weight": [1.0, 1.0, 0.0]}), folder / "tokens.parquet")
    method = explained(out, 3, capsys)["methods"]["longest"]
    picked = np.flatnonzero(pq.read_table(folder / "scores.parquet")["selected"].to_numpy())
    others = [int(id) for id in picked if id != 3]
    a = vectors.astype(float)
    cosines = {id: a[id] @ a[3] / np.linalg.norm(a[id]) / np.linalg.norm(a[3]) for id in others}
    near = method["nearest_chosen"]
    assert near["by"] == "embeddings of the scorer"
    assert [row["id"] for row in near["rows"]] == sorted(others, key=lambda id: -cosines[id])[:5]
    assert near["rows"][0]["cosine"] == pytest.approx(max(cosines.values()), abs=1e-3)
    assert [token["token"] for token in method["token_scores"]] == ["yes", "no"]


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["id=3"], 2, "which run?"),
        (["run=nowhere", "id=3"], 2, "there is no run in nowhere"),
        (["run=RUN", "id=99"], 3, "there is no row 99"),
        (["run=RUN", "id=three"], 2, "id takes the number of a row"),
        (["run=RUN", "id=1", "recipe=longst"], 2, 'Did you mean "longest"?'),
        (["run=RUN", "idd=1"], 2, 'Did you mean "id"?'),
    ],
)
def test_explain_refuses_clearly(select, capsys, words, code, expected):
    out = select("longest", "budget=6")
    capsys.readouterr()
    assert cli.entry(["select", "explain", *(word.replace("RUN", str(out)) for word in words)]) == code
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["eval", "merge", "generate"])
def test_a_run_that_only_selected_has_no_model(select, capsys, verb):
    """One line with the way out, whether one recipe selected or several."""
    more = ["prompt=what"] if verb == "generate" else []
    several = select("longest,random", "budget=6", out="several")
    capsys.readouterr()
    assert cli.entry([verb, f"run={several}", *more]) == 2
    said = capsys.readouterr().err
    assert f"{several} holds what longest and random selected, and no trained model" in said
    assert "ftrun train recipe=longest" in said and "Traceback" not in said
    one = select("longest", "budget=6", out="one")
    capsys.readouterr()
    assert cli.entry([verb, f"run={one}", *more]) == 2
    said = capsys.readouterr().err
    assert f"{one} holds no trained model" in said and "It only selected" in said
