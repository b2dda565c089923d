"""RDS+ and sentence embeddings: what is read, how it is pooled, and what is compared."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ftrun.errors import ConfigError, DataError, ResourceError
from ftrun.select.base import Budget, Scorer, Table
from ftrun.select.geometry import nearest
from ftrun.select.geometry.embed import embed_rows
from ftrun.select.pickers.round_robin import RoundRobin
from ftrun.select.pickers.top_k import TopK
from ftrun.select.run import _budget
from ftrun.select.scorers.embedding_similarity import EmbeddingSimilarity
from ftrun.select.scorers.rds_plus import RdsPlus, weighted_mean_states

CHAT = [
    {"role": "system", "content": "the dog"},
    {"role": "user", "content": " what is 1 "},
    {"role": "assistant", "content": "answers: 1"},
    {"role": "user", "content": "plus 2"},
    {"role": "assistant", "content": "answers: 3"},
]


def plain_embedding(bundle, ids: list[int]) -> np.ndarray:
    """sum_i i h_i / sum_j j of one text alone, of length 1."""
    with torch.no_grad():
        states = bundle.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].double().numpy()
    total = np.zeros(states.shape[1])
    for place, state in enumerate(states, 1):
        total += place * state
    total /= sum(range(1, len(ids) + 1))
    return total / np.linalg.norm(total)


def test_weights_rise_evenly_and_sum_to_one():
    """States that name their place make the mean show the weights; two texts in one row, padding at its end."""
    bundle = SimpleNamespace(model=None, architecture=SimpleNamespace(hidden_states=lambda *_: torch.eye(7)[None]))
    batch = SimpleNamespace(sequence=torch.tensor([[0, 0, 0, 0, 1, 1, -1]]), sequences=2)
    first, second = weighted_mean_states(bundle, batch)
    assert first == pytest.approx([0.1, 0.2, 0.3, 0.4, 0, 0, 0])
    assert second == pytest.approx([0, 0, 0, 0, 1 / 3, 2 / 3, 0])


def test_similarities_against_a_plain_loop(rows, make_pool, context, queries, bundle):
    """Embeddings at batch size 1, unpadded, in the text layout written out by hand."""
    pool = make_pool(rows[:12])
    ctx = context(select="rds_plus", shared=queries(rows[20:23]))
    columns = RdsPlus(query_tokens="whole").score(pool, ctx)

    def text(row: dict) -> str:
        prompt = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
        said = pool[0].messages[0].content
        assert said in (
            rows[0]["instruction"] + "\n\n" + rows[0]["input"],
            rows[0]["instruction"] + "\n" + rows[0]["input"],
        )
        if row["input"]:
            prompt = (
                row["instruction"]
                + said.removeprefix(rows[0]["instruction"]).removesuffix(rows[0]["input"])
                + row["input"]
            )
        return f"<|user|>\n{prompt}\n<|assistant|>\n{row['output'].strip()}<|im_end|>"

    def embedded(row: dict) -> np.ndarray:
        return plain_embedding(bundle, bundle.tokenizer(text(row), add_special_tokens=False).input_ids)

    expected = np.array([[embedded(q) @ embedded(row) for row in rows[:12]] for q in rows[20:23]])
    assert np.allclose(ctx.scorer.similarity.matrix, expected, atol=1e-5)
    assert np.allclose(columns["similarity"], expected.max(axis=0), atol=1e-5)
    assert ctx.scorer.similarity.matrix.dtype == np.float32
    assert np.allclose(np.linalg.norm(ctx.scorer.embeddings, axis=1), 1, atol=1e-5)


def test_the_text_of_a_conversation(make_pool, context, queries):
    pool = make_pool([{"messages": CHAT}])
    ctx = context(select="rds_plus")
    ids = RdsPlus().token_ids(pool, ctx, apart=False)[0]
    expected = (
        "<|system|>\nthe dog\n<|user|>\nwhat is 1\n<|assistant|>\nanswers: 1<|im_end|>\n"
        "<|user|>\nplus 2\n<|assistant|>\nanswers: 3<|im_end|>"
    )
    assert ctx.scorer.tokenizer.decode(ids) == expected
    apart = RdsPlus().token_ids(pool, ctx, apart=True)[0]
    encode = ctx.scorer.tokenizer
    head, tail = expected.removesuffix("answers: 3<|im_end|>"), "answers: 3<|im_end|>"
    assert apart == encode(head).input_ids + encode(tail).input_ids
    chat = RdsPlus(template="chat").token_ids(pool, ctx, apart=False)[0]
    assert encode.decode(chat).startswith("<|im_start|>system\nthe dog<|im_end|>\n<|im_start|>user\n")
    assert RdsPlus(template="chat").token_ids(pool, ctx, apart=True)[0] == chat


def test_long_rows_are_read_from_their_start(rows, make_pool, context):
    pool, ctx = make_pool(rows[:3]), context(select="rds_plus")
    whole = RdsPlus().token_ids(pool, ctx, apart=False)
    cut = RdsPlus(max_length=10).token_ids(pool, ctx, apart=False)
    assert cut == [ids[:10] for ids in whole] and len(whole[0]) > 10
    assert "read up to max_length=10" in ctx.report.stream.getvalue()


def test_equal_text_has_similarity_one(rows, make_pool, context, queries):
    ctx = context(select="rds_plus", shared=queries([rows[5]]))
    found = RdsPlus().score(make_pool(rows), ctx)["similarity"]
    assert found[5] == pytest.approx(1, abs=1e-5) and np.argmax(found) == 5
    assert (np.abs(found) <= 1 + 1e-5).all()


@pytest.mark.parametrize("kind", [RdsPlus, lambda: RdsPlus(pooling="mean")])
def test_scores_depend_on_nothing_but_the_row(kind, rows, make_pool, context, queries):
    """Not on the order of the pool, nor on batches and their padding."""
    shared = queries(rows[:3])
    one = kind().score(make_pool(rows), context(select="rds_plus", shared=shared))["similarity"]
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = make_pool([rows[i] for i in order])
    other = kind().score(shuffled, context(select="rds_plus", shared=shared))["similarity"]
    assert np.allclose(other, one[order], atol=1e-6)
    alone = kind().score(shuffled, context(select="rds_plus", shared=queries(rows[:3], batch_tokens=1)))["similarity"]
    assert np.allclose(alone, one[order], atol=1e-6)


def test_several_processes_score_alike(rows, make_pool, context, queries, together):
    shared, pool = queries(rows[:3], batch_tokens=64), make_pool(rows)
    alone = RdsPlus().score(pool, context(select="rds_plus", shared=shared))["similarity"]
    found = together(2, lambda team: RdsPlus().score(pool, context(select="rds_plus", shared=shared, team=team)))
    assert all(columns["similarity"].tolist() == alone.tolist() for columns in found)


def test_tasks_are_the_files(rows, make_pool, context, queries):
    ctx = context(select="rds_plus", shared=queries(rows[:2], rows[2:5]))
    RdsPlus().score(make_pool(rows), ctx)
    assert ctx.scorer.similarity.task.tolist() == [0, 0, 1, 1, 1]


def test_rows_without_text(rows, make_pool, context, queries):
    """Such a row has no score and says why; such a query ends the command."""
    pool = make_pool([{"text": "the dog"}, {"text": "a fox"}])
    empty = [{"text": "the dog"}, {"text": "a fox"}]
    ctx = context(select="rds_plus", shared=queries(empty))
    scorer = RdsPlus()
    vectors = scorer._embed([[], [5, 6], [7], [8]], ctx)
    assert not vectors[0].any() and vectors[1:].any(axis=1).all()
    from ftrun.select.queries import load_queries

    loaded = load_queries(ctx.settings)
    _, _, known = nearest.split_scored(vectors, pool, loaded, "no text", ctx)
    assert known.tolist() == [False, True] and ctx.scorer.reasons == {0: "no text"}
    with pytest.raises(DataError, match=r"queries0.jsonl:2"):
        nearest.split_scored(vectors[[1, 2, 3, 0]], pool, loaded, "no text", ctx)


def test_a_length_without_tokens_is_refused():
    with pytest.raises(ConfigError, match="max_length must be above 0"):
        RdsPlus(max_length=-5)


def test_without_queries(rows, make_pool, context):
    with pytest.raises(ConfigError, match="there are none"):
        RdsPlus().score(make_pool(rows), context(select="rds_plus"))


def test_a_picker_that_needs_queries_is_refused_before_scoring(context):
    ctx = context(select="random", picker="round_robin", budget=5)
    with pytest.raises(ConfigError, match="picker=round_robin picks rows near your queries, and select=random"):
        _budget(ctx.settings, Scorer(), RoundRobin(), 10)
    for scorer in (RdsPlus(), EmbeddingSimilarity()):
        assert _budget(ctx.settings, scorer, RoundRobin(), 10) == Budget(rows=5)


def test_sentence_embeddings_are_compared(rows, make_pool, context, queries):
    """The mean hidden state of the scoring model stands for the encoder, which may not be installed."""
    pool = make_pool(rows)
    ctx = context(select="embedding_similarity", shared=queries(rows[3:5]))
    found = EmbeddingSimilarity(embedding="model").score(pool, ctx)["similarity"]
    vectors = embed_rows(pool, ctx, "model")
    expected = np.array([[float(vectors[q] @ vectors[row]) for row in range(len(rows))] for q in (3, 4)])
    assert np.allclose(ctx.scorer.similarity.matrix, expected, atol=1e-6)
    assert np.allclose(found, expected.max(axis=0), atol=1e-6)
    table = Table({"similarity": found}, np.ones(len(rows), int), pool, ctx.scorer.embeddings, ctx.scorer.similarity)
    picked = TopK().pick(table, np.arange(len(rows)), "similarity", Budget(rows=2), ctx)
    assert sorted(picked.tolist()) == [3, 4]


def test_a_matrix_that_memory_cannot_hold(context, monkeypatch):
    monkeypatch.setattr(nearest, "available_bytes", lambda device: 1e9)
    with pytest.raises(ResourceError, match=r"1,000,000 rows to 1,000 queries take 4.0 GB"):
        nearest.check_room(1000, 1_000_000, context())


def test_products_are_made_in_blocks(monkeypatch):
    monkeypatch.setattr(nearest, "ROWS_AT_ONCE", 32)
    rng = np.random.default_rng(0)
    queries, rows = rng.normal(size=(5, 8)).astype(np.float32), rng.normal(size=(75, 8)).astype(np.float32)
    found = nearest.products(queries, rows)
    assert np.allclose(found, np.einsum("qw,rw->qr", queries, rows), atol=1e-5)
