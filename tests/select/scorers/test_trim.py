"""trim against its formulas, computed token by token from the maps of an eager model."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest
import torch

from ftrun.config.settings import DataConfig, SelectConfig
from ftrun.data.batches import collate
from ftrun.errors import ConfigError
from ftrun.models.attention import states_and_maps
from ftrun.select.scorers.trim import Trim, received, saliency, sharpness
from ftrun.select.trials.inner import InnerTraining
from ftrun.training.scoring import segments


@pytest.fixture
def eager(tiny_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_dir, attn_implementation="eager").eval()


@pytest.fixture
def targeted(context, tmp_path):
    """A context whose queries are these rows, one file for each list."""

    def make(*tasks, **settings):
        files = []
        for number, rows in enumerate(tasks):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            file = tmp_path / f"task{number}-{zlib.crc32(lines.encode())}.jsonl"
            if not file.exists():
                file.write_text(lines)
            files.append(str(file))
        return context(select="trim", shared=SelectConfig(queries=files), data=DataConfig(path="-"), **settings)

    return make


def prompt_and_response(bundle, row) -> tuple[list[int], list[int]]:
    prompt = row["instruction"] + "\n" + (row.get("input", "") + "\n" if row.get("input") else "")
    return tuple(bundle.tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, row["output"]))


def of_text(eager, ids: list[int], layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Salience (tokens,) and unit states (tokens, width) of one text, in loops."""
    with torch.no_grad():
        out = eager.model(torch.tensor([ids]), output_attentions=True)
    hidden = out.last_hidden_state[0].double().numpy()
    n, alphas = len(ids), []
    for maps in out.attentions[-layers:]:
        for a in maps[0].double().numpy():
            q = [1 + sum(a[i, j] * np.log(a[i, j] + 1e-12) for j in range(i + 1)) / np.log(i + 1) for i in range(1, n)]
            k = [sum(a[i, j] for i in range(j, n)) / (n - j) for j in range(1, n)]
            alphas.append([(x + y / max(k)) / 2 for x, y in zip(q, k, strict=True)])
    return np.concatenate([[0], np.mean(alphas, axis=0)]), hidden / np.linalg.norm(hidden, axis=1, keepdims=True)


def plain_trim(eager, bundle, targets, row, layers=2, penalty=0.5, scope="all") -> tuple[float, float]:
    """Mean and highest token score of one row."""

    def counted(prompt, response):
        return {
            "all": range(1, len(prompt) + len(response)),
            "prompt": range(1, len(prompt)),
            "response": range(len(prompt), len(prompt) + len(response)),
        }[scope]

    prints: dict[int, np.ndarray] = {}
    for target in targets:
        prompt, response = prompt_and_response(bundle, target)
        ids = prompt + response
        alpha, states = of_text(eager, ids, layers)
        for i in counted(prompt, response):
            prints[ids[i]] = prints.get(ids[i], 0) + alpha[i] * states[i]
    prints = {token: total / np.linalg.norm(total) for token, total in prints.items()}
    embedding = eager.model.embed_tokens.weight.detach().double().numpy()
    unit = embedding / np.maximum(np.linalg.norm(embedding, axis=1, keepdims=True), 1e-12)
    prompt, response = prompt_and_response(bundle, row)
    _, states = of_text(eager, prompt + response, layers)
    scores = []
    for i in counted(prompt, response):
        token = (prompt + response)[i]
        near = token if token in prints else max(prints, key=lambda known: float(unit[known] @ unit[token]))
        scores.append(float(states[i] @ prints[near]) * (1 if token in prints else penalty))
    return float(np.mean(scores)), float(np.max(scores))


@pytest.mark.parametrize("scope", ["all", "prompt", "response"])
def test_scores_are_those_of_the_formulas(rows, make_pool, targeted, bundle, eager, scope):
    targets, pool = rows[:3], rows[5:12]
    scores = Trim(layers=2, warmup=0, scope=scope).score(make_pool(pool), targeted(targets))
    for place, row in enumerate(pool):
        mean, top = plain_trim(eager, bundle, targets, row, scope=scope)
        assert scores["mean"][place] == pytest.approx(mean, abs=1e-5)
        assert scores["top"][place] == pytest.approx(top, abs=1e-5)
        assert scores["trim"][place] == pytest.approx((mean + top) / 2, abs=1e-5)


def test_only_the_last_layers_count(rows, make_pool, targeted, bundle, eager):
    scores = Trim(layers=1, warmup=0, penalty=0.25, top_share=0.2).score(make_pool(rows[5:9]), targeted(rows[:3]))
    for place, row in enumerate(rows[5:9]):
        mean, top = plain_trim(eager, bundle, rows[:3], row, layers=1, penalty=0.25)
        assert scores["trim"][place] == pytest.approx(0.8 * mean + 0.2 * top, abs=1e-5)


def test_maps_are_those_of_eager_attention_and_the_model_stays_as_it_was(bundle, eager):
    texts = [[5, 9, 30, 41, 7], list(range(20, 31))]
    batch = collate(segments([([], ids) for ids in texts]), [[0], [1]], bundle.pad_id)
    shared = [layer.self_attn.config for layer in bundle.architecture.layers]
    with torch.no_grad():
        before = bundle.architecture.hidden_states(bundle.model, batch)
        kept: list[torch.Tensor] = []
        states = states_and_maps(bundle, batch, 1, kept.append)
        after = bundle.architecture.hidden_states(bundle.model, batch)
        assert len(kept) == 1
        for row, ids in enumerate(texts):
            expected = eager.model(torch.tensor([ids]), output_attentions=True).attentions[-1][0]
            torch.testing.assert_close(kept[0][row, :, : len(ids), : len(ids)], expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(states, before, atol=1e-5, rtol=1e-5)
    assert torch.equal(before, after)
    for layer, config in zip(bundle.architecture.layers, shared, strict=True):
        assert layer.self_attn.config is config and config._attn_implementation != "eager"
        assert not layer.self_attn._forward_hooks and not layer.self_attn._forward_pre_hooks


def causal(time: int) -> torch.Tensor:
    return torch.ones(time, time).tril()


def test_even_attention_is_not_sharp_and_single_attention_is():
    even = causal(9) / torch.arange(1, 10)[:, None]
    torch.testing.assert_close(sharpness(even[None]), torch.zeros(1, 8), atol=1e-5, rtol=0)
    single = torch.zeros(9, 9)
    single[torch.arange(9), torch.tensor([0, 0, 1, 1, 4, 0, 6, 2, 8])] = 1
    torch.testing.assert_close(sharpness(single[None]), torch.ones(1, 8), atol=1e-5, rtol=0)


def test_received_attention_does_not_favour_early_tokens():
    """A token that all later ones attend to alike counts as much wherever it stands."""
    attention = torch.zeros(1, 8, 8)
    attention[0, :, 0] = 0.5
    for key in (2, 6):
        attention[0, key:, key] = 0.25
    found = received(attention)[0]
    assert found[1] == found[5] == 1 and found[0] == 0


def test_saliency_lies_between_0_and_1_and_starts_with_0():
    attention = torch.rand(3, 12, 12).tril()
    attention /= attention.sum(-1, keepdim=True)
    found = saliency(attention)
    assert found.shape == (12,) and found[0] == 0 and (found >= 0).all() and (found <= 1).all()
    assert saliency(torch.ones(2, 1, 1)).tolist() == [0]


def test_the_only_target_row_scores_one_on_each_token(make_pool, targeted, bundle):
    row = {"instruction": "the quick brown fox", "output": "yes jumps over"}
    prompt, response = prompt_and_response(bundle, row)
    assert len(set(prompt + response)) == len(prompt + response)
    other = {"instruction": "what is 3", "output": "no dog"}
    scores = Trim(warmup=0).score(make_pool([row, other]), targeted([row]))
    assert scores["mean"][0] == pytest.approx(1, abs=1e-6) and scores["top"][0] == pytest.approx(1, abs=1e-6)
    assert scores["trim"][1] < 1


def test_fingerprints_have_length_one(rows, make_pool, targeted):
    ctx = targeted(rows[:6])
    classes, prints = Trim(warmup=0)._fingerprints(make_pool(rows[:6]), ctx.scorer, ctx)
    assert len(set(classes.tolist())) == len(classes) == len(prints)
    np.testing.assert_allclose(np.linalg.norm(prints, axis=1), 1, atol=1e-9)


def test_larger_states_change_nothing(rows, make_pool, targeted, bundle):
    pool = make_pool(rows[5:10])
    plain = Trim(warmup=0).score(pool, targeted(rows[:3]))["trim"]
    bundle.model.model.norm.weight.data *= 3
    np.testing.assert_allclose(Trim(warmup=0).score(pool, targeted(rows[:3]))["trim"], plain, atol=1e-5)


def test_a_row_counts_by_its_best_task(rows, make_pool, targeted):
    pool = make_pool(rows[8:16])
    one, other = (Trim(warmup=0).score(pool, targeted(task))["trim"] for task in (rows[:3], rows[3:6]))
    ctx = targeted(rows[:3], rows[3:6])
    both = Trim(warmup=0).score(pool, ctx)["trim"]
    np.testing.assert_allclose(both, np.maximum(one, other), atol=1e-6)
    np.testing.assert_allclose(ctx.scorer.similarity.matrix, np.stack([one, other]), atol=1e-6)
    assert ctx.scorer.similarity.task.tolist() == [0, 1]


def test_few_target_rows_are_drawn_by_content(rows, make_pool, targeted):
    pool, ctx = make_pool(rows[:5]), targeted(rows)
    first = Trim(warmup=0, targets=4).score(pool, ctx)["trim"]
    assert "4 of 24 query rows make the fingerprints" in ctx.report.console.file.getvalue()
    again = Trim(warmup=0, targets=4).score(pool, targeted(rows[::-1]))["trim"]
    np.testing.assert_allclose(again, first, atol=1e-6)


def test_special_tokens_never_count(make_pool, targeted, bundle):
    row = {"instruction": "what is 1", "output": "yes"}
    ctx = targeted([row])
    scorer = Trim(warmup=0, template="chat")
    from ftrun.select.scoring.texts import read_turns

    table = scorer._sequences(read_turns(make_pool([row]), ctx, "chat"), ctx, 1)[0]
    marks = ["<|im_start|>", "<|im_end|>"]
    special = np.isin(table.input_ids, bundle.tokenizer.convert_tokens_to_ids(marks))
    assert special.sum() >= 3 and not table.loss_weight[special].any() and table.loss_weight[1:][~special[1:]].all()


def test_rows_without_tokens_have_a_reason(rows, make_pool, targeted):
    long = {"instruction": "word " * 40, "input": "", "output": "yes"}
    ctx = targeted(rows[:2])
    scores = Trim(warmup=0, scope="response", max_length=50).score(make_pool([*rows[:2], long]), ctx)
    assert np.isnan(scores["trim"]).tolist() == [False, False, True]
    assert ctx.scorer.reasons == {2: "no token of the response counts within max_length=50"}
    ctx = targeted(rows[:2])
    assert np.isnan(Trim(warmup=0).score(make_pool([{"text": "no turns"}]), ctx)["trim"]).all()
    assert ctx.scorer.reasons == {0: "no response"}


def test_scores_do_not_depend_on_order_batch_or_processes(rows, make_pool, targeted, together, context):
    pool, wanted = make_pool(rows), rows[:4]
    plain = Trim(warmup=0).score(pool, targeted(wanted))["trim"]
    order = np.random.default_rng(0).permutation(24)
    shuffled = Trim(warmup=0).score(make_pool([rows[i] for i in order]), targeted(wanted))["trim"]
    np.testing.assert_allclose(shuffled, plain[order], atol=1e-6)
    small = targeted(wanted)
    small.scorer.batch_tokens = 64
    np.testing.assert_allclose(Trim(warmup=0).score(pool, small)["trim"], plain, atol=1e-6)
    for found in together(2, lambda team: Trim(warmup=0).score(pool, targeted(wanted, team=team))["trim"]):
        np.testing.assert_allclose(found, plain, atol=1e-6)


def test_the_model_learns_a_share_of_the_pool_first(rows, make_pool, targeted, bundle, monkeypatch):
    pool, trained = make_pool(rows), []
    before = {name: value.clone() for name, value in bundle.model.state_dict().items()}
    plain = InnerTraining.run

    def watched(self, table, ctx, title=""):
        trained.append(table.record.tolist())
        yield from plain(self, table, ctx, title)

    monkeypatch.setattr(InnerTraining, "run", watched)
    cold = Trim(warmup=0).score(pool, targeted(rows[:3]))["trim"]
    warm = Trim(warmup=0.25, warmup_learning_rate=1e-2).score(pool, targeted(rows[:3]))["trim"]
    assert len(trained) == 1 and len(set(trained[0])) == 6
    assert np.abs(warm - cold).max() > 1e-4
    assert all(torch.equal(value, before[name]) for name, value in bundle.model.state_dict().items())


def test_several_answers_count_by_their_mean(make_pool, targeted, bundle, rows):
    turns = [("user", "what is 1"), ("assistant", "that is 1"), ("user", "what is 2"), ("assistant", "yes that is 2")]
    talk = {"messages": [{"role": role, "content": content} for role, content in turns]}
    singles = [
        {"messages": talk["messages"][:2]},
        {"messages": [{"role": "user", "content": "what is 1\nthat is 1\nwhat is 2"}, talk["messages"][3]]},
    ]
    scores = Trim(warmup=0).score(make_pool([talk, *singles]), targeted(rows[:3]))["trim"]
    assert scores[0] == pytest.approx(scores[1:].mean(), abs=1e-6)


@pytest.mark.parametrize("knobs", [{"layers": 0}, {"penalty": 2.0}, {"warmup": -0.1}, {"warmup_learning_rate": 0.0}])
def test_impossible_knobs_are_refused(knobs):
    with pytest.raises(ConfigError):
        Trim(**knobs)
