"""tshirt against its formulas, computed text by text from embeddings with noise; its picker; exact percentiles."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from ftrun.errors import ConfigError
from ftrun.models.fast import packs_for_free, speed_up
from ftrun.runs.progress import Reporter
from ftrun.select.base import Budget, Table
from ftrun.select.pickers.steady import Steady
from ftrun.select.scorers.superfiltering import Superfiltering
from ftrun.select.scorers.tshirt import Tshirt, noise, selective_ifd
from ftrun.select.scoring.quantiles import percentile, rows_on_disk
from ftrun.training.scoring import Scoring


def ids(bundle, text: str) -> list[int]:
    return bundle.tokenizer(text, add_special_tokens=False).input_ids


def nll_of(bundle, embeddings: torch.Tensor, tokens: list[int]) -> np.ndarray:
    """Losses of tokens 1.. from embeddings, one text at a time, through inputs_embeds."""
    with torch.no_grad():
        logits = bundle.model(inputs_embeds=embeddings[None]).logits[0, :-1].double()
    return -torch.log_softmax(logits, -1)[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])].numpy()


def by_hand(bundle, rows, copies: int, alpha: float, k: float, seed: int = 0):
    """s_ifd, its spread and ifd of every row, in plain loops."""
    table = bundle.model.get_input_embeddings().weight.detach()
    gaps, ifd = [], np.empty((len(rows), copies))
    for place, row in enumerate(rows):
        prompt = ids(bundle, row["instruction"] + "\n" + (row["input"] + "\n" if row["input"] else ""))
        response = ids(bundle, row["output"])
        of_row = []
        for copy in range(copies):
            drawn = torch.from_numpy(noise(prompt, response, table.shape[1], alpha, (copy, seed)))
            whole = nll_of(bundle, table[prompt + response] + drawn, prompt + response)[len(prompt) - 1 :]
            alone = nll_of(bundle, table[response] + drawn[len(prompt) :], response)
            ifd[place, copy] = np.exp(whole.mean()) / np.exp(alone.mean())
            of_row.append(whole[1:] - alone)
        gaps.append(of_row)
    everything = np.concatenate([np.abs(one) for of_row in gaps for one in of_row])
    tau = np.percentile(everything, 100 - k)
    s_ifd = np.ones((len(rows), copies))
    for place, of_row in enumerate(gaps):
        for copy, one in enumerate(of_row):
            counted = one[np.abs(one) > tau]
            if len(counted):
                s_ifd[place, copy] = np.exp(counted.mean())
    return s_ifd.mean(1), s_ifd.std(1), ifd.mean(1), everything, tau


@pytest.mark.parametrize("k", [25.0, 50.0, 100.0])
def test_scores_are_the_formulas(rows, make_pool, context, bundle, k):
    scores = Tshirt(copies=3, k=k).score(make_pool(rows), context())
    s_ifd, spread, ifd, everything, tau = by_hand(bundle, rows, 3, 5.0, k)
    np.testing.assert_allclose(scores["s_ifd"], s_ifd, rtol=1e-5)
    np.testing.assert_allclose(scores["s_ifd_std"], spread, atol=1e-5)
    np.testing.assert_allclose(scores["ifd"], ifd, rtol=1e-5)
    share = (everything > tau).mean()
    assert share == pytest.approx(k / 100, abs=2 / len(everything)) and share < 1  # the smallest never counts


def test_without_noise_every_copy_is_the_row_itself(rows, make_pool, context):
    scores = Tshirt(copies=3, alpha=0.0).score(make_pool(rows), context())
    plain = Superfiltering().score(make_pool(rows), context())
    np.testing.assert_allclose(scores["s_ifd_std"], 0, atol=1e-12)
    np.testing.assert_allclose(scores["ifd"], plain["ifd"], rtol=1e-5)


def test_noise_is_bounded_and_follows_from_the_content():
    drawn = noise([1, 2], [3, 4, 5], 16, 5.0, (0, 0))
    assert drawn.shape == (5, 16) and drawn.dtype == np.float32
    assert 0 < np.linalg.norm(drawn) <= 5
    np.testing.assert_array_equal(drawn, noise([1, 2], [3, 4, 5], 16, 5.0, (0, 0)))
    for other in (
        noise([1, 2, 3], [4, 5], 16, 5.0, (0, 0)),
        noise([1, 2], [3, 4, 5], 16, 5.0, (1, 0)),
        noise([1, 2], [3, 4, 5], 16, 5.0, (0, 1)),
    ):
        assert (drawn != other).any()
    uniform = noise([1] * 200, [2], 100, 1.0, (0, 0)) * np.sqrt(201 * 100)
    assert abs(uniform.mean()) < 0.02 and uniform.var() == pytest.approx(1 / 3, rel=0.02)


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_batches_do_not_matter(rows, make_pool, context, batch_tokens):
    from ftrun.config.settings import SelectConfig

    few = context(shared=SelectConfig(batch_tokens=batch_tokens))
    ours, whole = (Tshirt(copies=2).score(make_pool(rows), ctx) for ctx in (few, context()))
    for name, values in whole.items():
        np.testing.assert_allclose(ours[name], values, atol=1e-6)


def test_rows_apart_score_as_packed(rows, make_pool, context, bundle, monkeypatch):
    speed_up(bundle.model)
    assert packs_for_free(bundle.model, bundle.architecture)
    packed = Tshirt(copies=2).score(make_pool(rows), context())
    monkeypatch.setattr("ftrun.training.scoring.packs_for_free", lambda model, architecture: False)
    apart = Tshirt(copies=2).score(make_pool(rows), context())
    for name, values in packed.items():
        np.testing.assert_allclose(apart[name], values, atol=1e-6)


def test_order_and_processes_do_not_change_a_bit(rows, make_pool, context, together):
    expected = Tshirt(copies=2).score(make_pool(rows), context())
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = Tshirt(copies=2).score(make_pool([rows[i] for i in order]), context())
    pool = make_pool(rows)
    shared = together(2, lambda team: Tshirt(copies=2).score(pool, context(team=team)))
    for name, values in expected.items():
        np.testing.assert_array_equal(shuffled[name], values[order])
        for scores in shared:
            np.testing.assert_array_equal(scores[name], values)


def test_a_killed_scoring_goes_on(rows, make_pool, context, bundle, tmp_path, monkeypatch):
    pool = make_pool(rows)
    expected = Tshirt(copies=3).score(pool, context())

    def start() -> tuple[Scoring, dict[str, np.ndarray] | None]:
        ctx = context()
        report = Reporter(rank=0, stream=io.StringIO(), live=False)
        ctx.scoring = Scoring(lambda: bundle, ctx.team, report, 256, tmp_path / "shards", shard_seconds=0.0)
        try:
            return ctx.scoring, Tshirt(copies=3).score(pool, ctx)
        except KeyboardInterrupt:
            return ctx.scoring, None

    compute, calls = Scoring._compute, []

    def dies(self, *arguments):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(1)
        return compute(self, *arguments)

    monkeypatch.setattr(Scoring, "_compute", dies)
    killed, nothing = start()
    monkeypatch.undo()
    resumed, scores = start()
    assert nothing is None and scores is not None
    assert killed.computed > 0 and killed.computed + resumed.computed == 3 * len(rows)
    for name, values in expected.items():
        np.testing.assert_allclose(scores[name], values, atol=1e-6)


def test_rows_that_cannot_be_scored_are_named(make_pool, context, bundle):
    token = bundle.tokenizer.decode([ids(bundle, "yes")[0]])
    rows = [
        {"prompt": "a", "completion": token},
        {"prompt": "a", "completion": "yes no yes"},
        {"prompt": "word " * 30, "completion": "yes no yes"},
    ]
    ctx = context()
    scores = Tshirt(copies=2, max_length=20).score(make_pool(rows), ctx)
    assert np.isnan(scores["s_ifd"]).tolist() == [True, False, True]
    assert ctx.scorer.reasons == {0: "a one-token response has no gap", 2: "the prompt fills max_length=20"}
    assert Tshirt().keep(Table(scores, np.ones(3, np.int64))).tolist()[::2] == [False, False]
    nothing = context()
    assert np.isnan(Tshirt().score(make_pool([{"text": "no turns"}]), nothing)["s_ifd"]).all()
    assert nothing.scorer.reasons == {0: "no response"}


def test_a_long_response_is_cut_for_both_sides(make_pool, context, bundle):
    row = {"instruction": "what is this", "input": "", "output": "yes no " * 40}
    room = 30 - len(ids(bundle, "what is this\n"))
    cut = bundle.tokenizer.decode(ids(bundle, row["output"])[:room])
    assert ids(bundle, cut) == ids(bundle, row["output"])[:room]
    ctx = context()
    ours = Tshirt(copies=2, max_length=30).score(make_pool([row]), ctx)
    np.testing.assert_allclose(ours["ifd"], by_hand(bundle, [row | {"output": cut}], 2, 5.0, 50)[2], rtol=1e-5)
    assert "1 of 1 responses are scored up to" in ctx.report.console.file.getvalue()


def test_no_counted_token_gives_one():
    gaps, starts = np.array([0.1, -0.5, 0.2, 0.1], np.float32), np.array([0, 2])
    np.testing.assert_allclose(selective_ifd(gaps, starts, 0.3), [np.exp(-0.5), 1])


def test_of_the_highest_the_steadiest():
    columns = {
        "s_ifd": np.array([0.9, 0.8, 0.7, 0.6, 0.5]),
        "s_ifd_std": np.array([0.3, 0.1, 0.2, 0.0, 0.1]),
    }
    table, everyone = Table(columns, np.full(5, 10)), np.arange(5)
    pick = lambda picker, budget: picker.pick(table, everyone, "s_ifd", budget, None).tolist()  # noqa: E731
    assert pick(Steady(), Budget(rows=1)) == [1]
    assert pick(Steady(), Budget(rows=2)) == [3, 1]
    assert pick(Steady(), Budget(tokens=10)) == [1]
    assert pick(Steady(oversampling=1), Budget(rows=2)) == [1, 0]
    assert pick(Steady(oversampling=1.5), Budget(rows=2)) == [1, 2]
    with pytest.raises(ConfigError, match="spread"):
        Steady().pick(Table({"ifd": columns["s_ifd"]}, table.lengths), everyone, "ifd", Budget(rows=1), None)


@pytest.mark.parametrize("q", [0.0, 12.5, 50.0, 73.3, 100.0])
@pytest.mark.parametrize("sizes", [[1], [5, 1, 300], [40, 40]])
def test_percentiles_are_exact(q, sizes):
    random = np.random.default_rng(0)
    parts = [(random.normal(size=size) * 10.0 ** random.integers(-3, 3)).astype(np.float32) for size in sizes]
    expected = np.percentile(np.abs(np.concatenate(parts)).astype(np.float64), q)
    assert percentile(parts, q) == pytest.approx(expected, rel=1e-12)


def test_rows_on_disk_leave_nothing(tmp_path):
    with rows_on_disk(3, 4, tmp_path) as array:
        array[1] = np.arange(4)
        assert array[1].tolist() == [0, 1, 2, 3] and array[0].tolist() == [0] * 4
        assert not list(tmp_path.iterdir())


def test_useless_knobs_are_refused():
    for knobs in ({"copies": 0}, {"k": 101.0}, {"max_length": 0}):
        with pytest.raises(ConfigError):
            Tshirt(**knobs)
