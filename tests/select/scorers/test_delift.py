"""delift against its formulas, computed pair by pair."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ftrun.config.settings import DataConfig, SelectConfig
from ftrun.errors import ConfigError
from ftrun.select.scorers.delift import Delift, min_max


@pytest.fixture
def distance(bundle, plain_nll):
    """||1 - p|| / sqrt(tokens) of the response and its end, after an example and the prompt, at batch size 1."""

    def ids(text: str) -> list[int]:
        return bundle.tokenizer(text, add_special_tokens=False).input_ids

    def prompt_of(row) -> str:
        return row["instruction"] + "\n" + (row["input"] + "\n" if row.get("input") else "")

    def one(row, example=None, room: int = 10_000) -> float:
        end = [bundle.tokenizer.eos_token_id]
        before: list[int] = []
        if example is not None:
            before = (ids(prompt_of(example)) + end + ids(example["output"]) + end)[:room]
        target = ids(row["output"]) + end
        context = before + ids(prompt_of(row)) + end
        p = np.exp(-plain_nll(bundle, context + target)[len(context) - 1 :])
        assert len(p) == len(target)
        return float(np.linalg.norm(1 - p) / np.sqrt(len(target)))

    return one


def utility_of(rows, examples, distance) -> np.ndarray:
    return np.array([[distance(row) - distance(row, example) for example in examples] for row in rows])


def greedy(value, count: int) -> tuple[list[int], list[float]]:
    """Plain greedy maximisation of ``value(chosen)``."""
    chosen: list[int] = []
    gains = []
    while len(chosen) < count:
        left = [j for j in range(count) if j not in chosen]
        found = [value([*chosen, j]) - value(chosen) for j in left]
        best = int(np.argmax(np.round(found, 7)))
        gains.append(found[best])
        chosen.append(left[best])
    return chosen, gains


def assert_follows(scores: np.ndarray, value) -> None:
    """The scores are the gains of plain greedy, and their order is its order wherever gains differ."""
    order, gains = greedy(value, len(scores))
    np.testing.assert_allclose(np.sort(scores)[::-1], gains, atol=2e-4)
    np.testing.assert_allclose(scores[order], gains, atol=2e-4)


def write(tmp_path, name: str, rows) -> str:
    file = tmp_path / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_facility_location_over_all_rows(rows, make_pool, context, distance):
    few = rows[:8]
    scores = Delift().score(make_pool(few), context())
    raw = utility_of(few, few, distance)
    np.testing.assert_allclose(scores["utility"], raw.mean(axis=0), atol=1e-6)
    scaled = (raw - raw.min()) / (raw.max() - raw.min())
    assert_follows(scores["delift"], lambda chosen: sum(max((u[j] for j in chosen), default=0) for u in scaled))


def test_mutual_information_with_target_rows(rows, make_pool, context, distance, tmp_path):
    few, wanted = rows[:7], rows[10:13]
    ctx = context(shared=SelectConfig(queries=[write(tmp_path, "dev.jsonl", wanted)]), data=DataConfig(path="-"))
    scores = Delift(eta=0.5).score(make_pool(few), ctx)
    raw = utility_of(few, [*few, *wanted], distance)
    scaled = (raw - raw.min()) / (raw.max() - raw.min())

    def value(chosen: list[int]) -> float:
        if not chosen:
            return 0
        return sum(min(max(u[j] for j in chosen), 0.5 * max(u[7:])) for u in scaled)

    assert_follows(scores["delift"], value)


def test_conditional_gain_beyond_old_rows(rows, make_pool, context, distance, tmp_path):
    few, known = rows[:7], rows[10:13]
    old = write(tmp_path, "old.jsonl", known)
    scores = Delift(nu=0.9, old=old).score(make_pool(few), context(data=DataConfig(path="-")))
    raw = utility_of(few, [*few, *known], distance)
    scaled = (raw - raw.min()) / (raw.max() - raw.min())

    def value(chosen: list[int]) -> float:
        return sum(max(max((u[j] for j in chosen), default=0) - 0.9 * max(u[7:]), 0) for u in scaled)

    assert_follows(scores["delift"], value)


def test_old_rows_that_know_nothing_change_nothing(rows, make_pool, context, tmp_path):
    """Without weight on what is known, the conditional gain is facility location."""
    few = rows[:6]
    old = write(tmp_path, "old.jsonl", few[:1])  # a row of the pool: the scale stays the same
    plain = Delift().score(make_pool(few), context())["delift"]
    beyond = Delift(nu=0.0, old=old).score(make_pool(few), context(data=DataConfig(path="-")))["delift"]
    np.testing.assert_allclose(beyond, plain, atol=1e-6)


def test_a_model_that_ignores_its_context_finds_no_use(rows, make_pool, context, bundle):
    for parameter in bundle.model.parameters():
        parameter.data.zero_()
    ctx = context()
    scores = Delift().score(make_pool(rows[:5]), ctx)
    np.testing.assert_allclose(scores["utility"], 0, atol=1e-7)


def test_distances_lie_between_0_and_1(rows, make_pool, context):
    from ftrun.select.scorers.delift import Pairs
    from ftrun.select.scoring.texts import read_turns

    pool, ctx = make_pool(rows), context()
    pairs = Pairs(read_turns(pool, ctx, "plain"), len(pool), ctx, 2048)
    found = pairs._distances(ctx.scorer, list(range(24)), [[], pairs.example(3)])
    assert found.shape == (2, 24) and (found > 0).all() and (found <= 1).all()


def test_scaling():
    np.testing.assert_array_equal(min_max(np.array([[2.0, 4.0], [3.0, 6.0]])), [[0, 0.5], [0.25, 1]])
    np.testing.assert_array_equal(min_max(np.full((2, 2), 3.0)), 0)


def test_it_says_how_much_there_is_to_do(rows, make_pool, context):
    ctx = context()
    Delift().score(make_pool(rows[:6]), ctx)
    said = ctx.report.console.file.getvalue()
    assert "6 tasks x 6 examples = 36 forward passes over" in said and ", about" in said


def test_blocks_do_not_change_a_score(rows, make_pool, context, monkeypatch):
    whole = Delift().score(make_pool(rows[:8]), context())["utility"]
    monkeypatch.setattr("ftrun.select.trials.incontext.BLOCK_TOKENS", 500)
    np.testing.assert_array_equal(Delift().score(make_pool(rows[:8]), context())["utility"], whole)


def test_a_sample_bounds_the_cost(rows, make_pool, context, distance):
    ctx = context()
    scores = Delift(sample=5, evaluated=3).score(make_pool(rows), ctx)
    assert (~np.isnan(scores["delift"])).sum() == 5
    assert "3 tasks x 5 examples = 15 forward passes" in ctx.report.console.file.getvalue()
    assert set(ctx.scorer.reasons.values()) == {"not among the 5 rows drawn (select.sample)"}
    assert set(ctx.scorer.reasons) == set(np.flatnonzero(np.isnan(scores["delift"])).tolist())
    order = np.random.default_rng(0).permutation(24)
    shuffled = Delift(sample=5, evaluated=3).score(make_pool([rows[i] for i in order]), context())
    np.testing.assert_allclose(shuffled["utility"], scores["utility"][order], atol=1e-7)


def test_a_long_example_is_cut_and_never_the_row(make_pool, context, bundle, distance):
    short, long = {"instruction": "what", "output": "yes no"}, {"instruction": "what is", "output": "yes no " * 20}
    pool = make_pool([short, long])
    limit = 64
    own = len(bundle.tokenizer("what\n").input_ids) + len(bundle.tokenizer("yes no").input_ids) + 2
    ctx = context()
    scores = Delift(max_length=limit).score(pool, ctx)
    raw = [
        [distance(row) - distance(row, example, room) for example in (short, long)]
        for row, room in ((short, limit - own), (long, limit - _length(bundle, long)))
    ]
    np.testing.assert_allclose(scores["utility"], np.mean(raw, axis=0), atol=1e-6)
    assert "the end of the example is cut off: longer than 64 tokens" in ctx.report.console.file.getvalue()


def _length(bundle, row) -> int:
    return (
        len(bundle.tokenizer(row["instruction"] + "\n").input_ids) + len(bundle.tokenizer(row["output"]).input_ids) + 2
    )


def test_rows_that_cannot_be_tried_have_a_reason(rows, make_pool, context):
    pool = make_pool([*rows[:3], {"instruction": "what", "input": "", "output": "yes no " * 60}])
    ctx = context()
    scores = Delift(max_length=64).score(pool, ctx)
    assert np.isnan(scores["delift"]).tolist() == [False, False, False, True]
    assert ctx.scorer.reasons == {3: "prompt and response are longer than 64 tokens"}
    ctx = context()
    assert np.isnan(Delift().score(make_pool([{"text": "no turns"}]), ctx)["delift"]).all()
    assert ctx.scorer.reasons == {0: "no response"}


def test_a_conversation_is_judged_by_all_its_answers(make_pool, context, bundle, plain_nll, distance):
    turns = [("user", "what is 1"), ("assistant", "that is 1"), ("user", "what is 2"), ("assistant", "yes that is 2")]
    talk = {"messages": [{"role": role, "content": content} for role, content in turns]}
    single = {"messages": [{"role": "user", "content": "what is 3"}, {"role": "assistant", "content": "that is 3"}]}
    scores = Delift().score(make_pool([talk, single]), context())
    flat = {"instruction": "what is 3", "output": "that is 3"}
    first = {"instruction": "what is 1", "output": "that is 1"}
    last = {"instruction": "what is 1\nthat is 1\nwhat is 2", "output": "yes that is 2"}
    expected = [
        np.mean([distance(first) - distance(first, flat), distance(last) - distance(last, flat)]),
        distance(flat) - distance(flat, flat),
    ]
    assert scores["utility"][1] == pytest.approx(np.mean(expected), abs=1e-6)


def test_target_and_old_rows_exclude_each_other(rows, make_pool, context, tmp_path):
    file = write(tmp_path, "dev.jsonl", rows[:2])
    ctx = context(shared=SelectConfig(queries=[file]), data=DataConfig(path="-"))
    with pytest.raises(ConfigError, match="not for both"):
        Delift(old=file).score(make_pool(rows), ctx)


def test_several_processes_score_as_one(rows, make_pool, context, together):
    pool = make_pool(rows[:6])
    alone = Delift().score(pool, context())["delift"]
    for found in together(2, lambda team: Delift().score(pool, context(team=team))["delift"]):
        np.testing.assert_array_equal(found, alone)


@pytest.mark.parametrize("knobs", [{"sample": 0}, {"max_length": 0}, {"others": -1}, {"eta": -1.0}, {"nu": -0.5}])
def test_impossible_knobs_are_refused(knobs):
    with pytest.raises(ConfigError, match=r"at least 1|must not be negative"):
        Delift(**knobs)


def test_a_plan_counts_pairs():
    lengths = np.full(500, 100)
    assert Delift(sample=50, evaluated=20).planned_tokens(lengths) == 20 * 50 * 200
    assert Delift(sample=None).planned_tokens(lengths) == 500 * 500 * 200


def test_other_old_rows_make_another_selection(rows, rows_file, tiny_dir, tmp_path, capsys):
    """The stage cache sees what the file holds, not only its name."""
    from ftrun import cli

    old, said = tmp_path / "old.jsonl", []
    for attempt, known in enumerate((rows[:2], rows[:2], rows[2:4])):
        old.write_text("".join(json.dumps(row) + "\n" for row in known))
        words = ["recipe=delift", f"model.path={tiny_dir}", f"data.path={rows_file}", "budget=4", "select.sample=6"]
        assert cli.entry(["select", *words, f"select.old={old}", f"out={tmp_path / str(attempt)}"]) == 0
        said.append("reused" in capsys.readouterr().err)
    assert said == [False, True, False]
