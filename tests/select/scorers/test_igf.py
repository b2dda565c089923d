"""igf: gains against plain steps of AdamW, the secondary learner, and the order in which training sees the rows."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ftrun import cli
from ftrun.config.settings import DataConfig
from ftrun.data.batches import Plan
from ftrun.errors import ConfigError, DataError
from ftrun.models.fast import speed_up
from ftrun.select.base import Budget, Table
from ftrun.select.pickers.igf import Igf as Filter
from ftrun.select.scorers.igf import Igf
from ftrun.select.trials.inner import prepared_rows
from ftrun.select.trials.probes import InformationGain
from ftrun.select.trials.secondary import Fit, SecondaryLearner, padded

FAST: dict[str, Any] = {"probes": 12, "objective": 4, "learning_rate": 1e-2, "learner_rate": 1e-2, "learner_epochs": 3}


@pytest.fixture
def table(rows, make_pool, context):
    return prepared_rows(make_pool(rows), context()).table


def plain_mean(model, sequence) -> torch.Tensor:
    """Mean loss of the trained tokens of one text, by the model's own logits."""
    ids = torch.tensor(np.array(sequence.input_ids), dtype=torch.long)
    asked = torch.tensor(np.array(sequence.loss_weight[1:]) > 0)
    losses = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
    return losses[asked].mean()


def plain_perplexity(model, table) -> float:
    with torch.no_grad():
        return float(np.exp(np.mean([plain_mean(model, table.sequence(i)).double() for i in range(len(table))])))


@pytest.mark.parametrize(("rate", "clip"), [(1e-3, 3.0), (1e-2, 1e-6), (5e-3, None)])
def test_a_gain_is_what_one_step_of_adamw_brings(table, bundle, context, tiny_dir, rate, clip):
    """A clip as low as Adam's epsilon shows in the step; every text starts from the same weights, to the bit."""
    from transformers import AutoModelForCausalLM

    before = {name: value.clone() for name, value in bundle.model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in bundle.model.parameters()]
    speed_up(bundle.model)
    objective, texts = table.rows(np.arange(5)), table.rows(np.arange(5, 11))
    measure = InformationGain(texts, objective, rate, clip)
    gains = np.concatenate(context().scorer.measure(texts, "gain", measure))
    for index in range(6):
        model = AutoModelForCausalLM.from_pretrained(tiny_dir).eval()
        start = plain_perplexity(model, objective)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
        plain_mean(model, texts.sequence(index)).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        assert gains[index] == pytest.approx(start - plain_perplexity(model, objective), rel=2e-3, abs=2e-3)
    assert (np.abs(gains) > 0.01).all()
    for name, value in bundle.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert flags == [parameter.requires_grad for parameter in bundle.model.parameters()]
    assert all(parameter.grad is None for parameter in bundle.model.parameters())


def test_weights_come_back_when_a_probe_fails(table, bundle, context, monkeypatch):
    before = {name: value.clone() for name, value in bundle.model.state_dict().items()}
    measure = InformationGain(table, table.rows(np.arange(3)), 1e-2, 3.0)
    calls = []

    def dies(batches, bundle):
        calls.append(batches)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr("ftrun.select.trials.probes.perplexity", dies)
    with pytest.raises(KeyboardInterrupt):
        context().scorer.measure(table, "gain", measure)
    assert all(torch.equal(value, before[name]) for name, value in bundle.model.state_dict().items())


# ---- the secondary learner ----


def test_the_learner_is_its_layers_and_padding_has_no_say(bundle):
    torch.manual_seed(0)
    embedding = bundle.model.get_input_embeddings().weight
    learner = SecondaryLearner(embedding, np.array([3, 7, 9])).eval()
    learner.embedding.weight.data.add_(0.5)  # what was learned; the other classes stay those of the model
    state = {name: value.numpy() for name, value in learner.state_dict().items()}
    layers = [(state[f"layers.{place}.weight"], state[f"layers.{place}.bias"]) for place in (0, 2, 3)]
    assert [weight.shape for weight, _ in layers] == [(32, 256), (32, 32), (1, 32)]
    texts = [np.array([3, 7, 7, 9, 11]), np.array([9]), np.array([30, 31])]
    with torch.no_grad():
        found = learner(*padded(texts, np.arange(3), torch.device("cpu")))
    for text, value in zip(texts, found.tolist(), strict=True):
        vectors = np.stack([embedding[i].detach().numpy() + 0.5 * (i in (3, 7, 9)) for i in text.tolist()])
        around = np.pad(vectors, ((1, 1), (0, 0)))
        kernel, bias = state["convolution.weight"], state["convolution.bias"]
        over_time = [np.einsum("oik,ki->o", kernel, around[t : t + 3]) + bias for t in range(len(text))]
        values = np.stack(over_time).max(0)
        assert values.shape == (256,)
        for weight, bias in layers:
            values = weight @ values + bias
        assert value == pytest.approx(float(values[0]), rel=1e-4, abs=1e-5)


def test_it_learns_and_keeps_its_best_epoch(bundle):
    """A target that a token decides; the embeddings of the model stay as they were."""
    random = np.random.default_rng(0)
    texts = [random.integers(10, 40, random.integers(3, 9)) for _ in range(120)]
    target = np.array([2.0 * (12 in text or 13 in text) for text in texts])
    embedding = bundle.model.get_input_embeddings().weight
    before = embedding.detach().clone()
    torch.manual_seed(0)
    learner = SecondaryLearner(embedding, np.arange(10, 40))
    fit = Fit(epochs=30, batch_size=16, learning_rate=3e-3, held=30)
    error = fit.train(learner, texts, target)
    wanted = torch.from_numpy(target.astype(np.float32))
    assert error < 0.5 * target[:30].var() and fit.error(learner, texts, wanted) == pytest.approx(error, rel=1e-5)
    assert torch.equal(embedding, before)


def test_long_texts_are_cut_into_parts_that_change_nothing(bundle, monkeypatch):
    monkeypatch.setattr("ftrun.select.trials.secondary.DROPOUT", 0.0)
    random = np.random.default_rng(1)
    texts = [random.integers(10, 40, random.integers(3, 9)) for _ in range(24)]
    target = random.normal(size=24)
    learned = []
    for tokens in (8192, 20):
        monkeypatch.setattr("ftrun.select.trials.secondary.TOKENS_AT_ONCE", tokens)
        torch.manual_seed(0)
        learner = SecondaryLearner(bundle.model.get_input_embeddings().weight, np.arange(10, 40))
        Fit(3, 8, 1e-3, 4).train(learner, texts, target)
        with torch.no_grad():
            learned.append(learner(*padded(texts, np.arange(24), torch.device("cpu"))).numpy())
    np.testing.assert_allclose(learned[0], learned[1], atol=1e-4)


# ---- the scorer ----


def test_gains_are_standardised_and_q_is_known_for_every_row(rows, make_pool, context, queries):
    ctx = context(shared=queries(rows[:4]), data=DataConfig(path="-"))
    columns = Igf(**FAST).score(make_pool(rows), ctx)
    gain = columns["gain"][~np.isnan(columns["gain"])]
    assert len(gain) == 12
    assert gain.mean() == pytest.approx(0, abs=1e-6) and gain.std() == pytest.approx(1, rel=1e-6)
    assert columns["igf"].mean() == pytest.approx(0, abs=1e-6) and columns["igf"].std() == pytest.approx(1, rel=1e-6)
    learned = columns["learned"]
    np.testing.assert_allclose(columns["igf"], (learned - learned.mean()) / learned.std(), rtol=1e-6)
    ctx = context(shared=queries(rows[:4]), data=DataConfig(path="-"))
    np.testing.assert_array_equal(Igf(units="pairs", **FAST).score(make_pool(rows), ctx)["igf"], learned)


def test_neither_order_nor_processes_change_a_score(rows, make_pool, context, bundle):
    speed_up(bundle.model)
    order = np.random.default_rng(0).permutation(24)
    plain = Igf(**FAST).score(make_pool(rows), context())
    mixed = Igf(**FAST).score(make_pool([rows[place] for place in order]), context())
    for name, values in plain.items():
        np.testing.assert_array_equal(mixed[name], values[order])


def test_the_objective_of_the_pool_is_not_probed(rows, make_pool, context):
    ctx = context()
    knobs: dict[str, Any] = FAST | {"probes": 100}
    columns = Igf(**knobs).score(make_pool(rows), ctx)
    assert np.isnan(columns["gain"]).sum() == 4 and not np.isnan(columns["igf"]).any()
    said = ctx.report.console.file.getvalue()
    assert "4 texts of the pool are the objective" in said and "20 texts are probed" in said
    assert "explains" in said


def test_held_out_rows_are_the_objective_where_there_are_no_queries(rows, make_pool, context, monkeypatch):
    ctx = context()
    ctx.heldout = make_pool(rows[:3])
    seen = []
    plain = Igf._gains

    def watched(self, texts, objective, ctx):
        seen.append(objective)
        return plain(self, texts, objective, ctx)

    monkeypatch.setattr(Igf, "_gains", watched)
    columns = Igf(**FAST).score(make_pool(rows[3:]), ctx)
    assert len(seen[0]) == 3 and np.isfinite(columns["gain"]).sum() == 12


def test_pieces_of_a_long_text_count_by_their_mean(make_pool, context, text_file, monkeypatch):
    lines = [json.loads(line) for line in text_file.read_text().splitlines()]
    lines[0]["text"] = " ".join(line["text"] for line in lines)
    ctx = context(data=DataConfig(path="-", max_length=12))
    pool = make_pool(lines)
    pieces = prepared_rows(pool, ctx, ("text",)).table
    assert (pieces.record == 0).sum() > 5
    monkeypatch.setattr(
        Igf, "_predictions", lambda self, learner, table, ctx: np.arange(len(table.record), dtype=float)
    )
    learned = Igf(**FAST).score(pool, ctx)["learned"]
    assert (
        learned[0] == np.flatnonzero(pieces.record == 0).mean() and learned[1] == np.flatnonzero(pieces.record == 1)[0]
    )


def test_too_few_rows_are_refused(rows, make_pool, context):
    with pytest.raises(DataError, match="texts to probe"):
        Igf(**FAST).score(make_pool(rows[:7]), context())


@pytest.mark.parametrize("knobs", [{"probes": 3}, {"objective": 0}, {"learner_rate": 0.0}, {"clip": 0.0}])
def test_impossible_knobs_are_refused(knobs):
    with pytest.raises(ConfigError, match=r"igf|must be above 0"):
        Igf(**knobs)


# ---- the filter and the order of training ----


def online(score: np.ndarray, first: float, batches: int, later: float, size: int, seed: int, steps: int) -> list[list]:
    """The loop of the paper: go through shuffled rows, pass over those below T, T falls when the batches are full."""
    made: list[list] = []
    batch: list[int] = []
    epoch = 0
    while len(made) < steps:
        for row in np.random.default_rng([seed, epoch]).permutation(len(score)).tolist():
            threshold = first if len(made) < batches else later
            if score[row] >= threshold:
                batch.append(row)
            if len(batch) == size:
                made.append(batch)
                batch = []
        epoch += 1
    return made[:steps]


@pytest.mark.parametrize(("rows", "size", "batches"), [(200, 4, 3), (40, 16, 10), (30, 5, 0), (16, 4, 1)])
def test_the_plan_is_the_loop_with_a_falling_threshold(rows, size, batches):
    """A batch always holds ``size`` rows, all of which pass the threshold of the moment, also over several passes."""
    random = np.random.default_rng(rows)
    score = np.maximum(random.normal(size=rows), -0.9)  # the picker leaves the others out
    picker = Filter(first=0.8, first_batches=batches, later=-1.0)
    plan = Plan.of(rows, size, 1, 40, 3, begin=picker.passes(score, size, 3))
    found = [plan.step(number).tolist() for number in range(40)]
    assert found == online(score, 0.8, batches, -1.0, size, 3, 40)
    for number, batch in enumerate(found):
        assert len(batch) == size and (number >= batches or (score[batch] >= 0.8).all())


def test_without_a_threshold_training_is_plain():
    score = np.random.default_rng(0).normal(size=50)
    picker = Filter(first=-np.inf, later=-np.inf)
    for epochs in (0.5, 1, 3.3):
        plain = Plan.of(50, 4, epochs, None, 7)
        ours = Plan.of(50, 4, epochs, None, 7, begin=picker.passes(score, 4, 7))
        assert plain.steps == ours.steps
        for number in range(plain.steps):
            assert plain.step(number).tolist() == ours.step(number).tolist()


def test_an_epoch_is_a_pass_over_the_rows():
    """Rows that the filter passes over are no steps."""
    score = np.array([2.0, 0, 0, 0] * 10)
    begin = Filter(first=1.0, first_batches=2, later=-1.0).passes(score, 2, 0)
    assert len(begin) == 1 and len(begin[0]) < 40
    assert Plan.of(40, 2, 1, None, 0, begin=begin).steps == -(-len(begin[0]) // 2)
    assert Plan.of(40, 2, 2, None, 0, begin=begin).steps == -(-(len(begin[0]) + 40) // 2)


def test_the_picker_takes_what_training_may_see(context):
    table = Table({"igf": np.array([0.5, -2.0, 1.5, np.nan, -1.0])}, np.full(5, 10))
    picked = Filter().pick(table, np.array([0, 1, 2, 4]), "igf", Budget(rows=5), context())
    assert picked.tolist() == [2, 0, 4]
    assert Filter().pick(table, np.array([0, 1, 2, 4]), "igf", Budget(rows=2), context()).tolist() == [2, 0]


def test_a_threshold_that_no_row_passes_is_refused():
    with pytest.raises(DataError, match=r"the highest score is 0\.3"):
        Filter().passes(np.array([0.1, 0.3]), 4, 0)
    with pytest.raises(ConfigError, match="the threshold falls"):
        Filter(first=-2.0)
    with pytest.raises(ConfigError, match="must not be negative"):
        Filter(first_batches=-1)


def test_a_run_trains_in_that_order(tiny_dir, text_file, tmp_path, capsys, monkeypatch):
    """Through the command line, long texts in pieces; a resumed run goes on in the same order."""
    from ftrun.training.loop import Trainer

    lines = [json.loads(line) for line in text_file.read_text().splitlines()]
    lines[3]["text"] = " ".join(line["text"] for line in lines)
    text_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn: list[list[int]] = []
    plain = Trainer._my_batches

    def watched(self, step):
        drawn.append(np.asarray(self.table.record)[self.plan.step(step)].tolist())
        return plain(self, step)

    monkeypatch.setattr(Trainer, "_my_batches", watched)
    out = tmp_path / "run"
    words = ["recipe=igf", f"model.path={tiny_dir}", f"data.path={text_file}", "data.heldout=0", "data.max_length=16"]
    words += [
        "train.batch_size=2",
        "train.epochs=2",
        "select.picker.first_batches=3",
        "eval=[]",
        "select.learner_rate=1e-2",
    ]
    assert cli.entry(["train", *words, f"out={out}"]) == 0, capsys.readouterr().err
    scores = pq.read_table(out / "selection/scores.parquet").to_pydict()
    q = dict(zip(scores["id"], scores["igf"], strict=True))
    assert len(drawn) > 4 and all(len(batch) == 2 for batch in drawn)
    assert all(q[row] >= 1 for batch in drawn[:3] for row in batch)
    assert all(q[row] >= -1 for batch in drawn for row in batch) and any(
        q[row] < 1 for batch in drawn[3:] for row in batch
    )


def test_rows_made_by_a_token_policy_cannot_be_ordered(tiny_dir, text_file, context, table):
    from ftrun.select.order import training_order
    from ftrun.tokens.base import TokenPolicy

    class Edits(TokenPolicy):
        edits = True

    ctx = context(select="igf", picker="igf")
    settings = ctx.settings
    real = settings.component
    settings.component = lambda slot: Edits() if slot == "tokens" else real(slot)  # type: ignore[method-assign]
    settings.slots["tokens"] = ("pause_tuning", {})
    with pytest.raises(ConfigError, match="makes other rows"):
        training_order(table, ctx)
