"""Token cleaning against a loop over single rows, and what it writes."""

from __future__ import annotations

import copy

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ftrun.data.render import Renderer
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import ConfigError, DataError
from ftrun.tokens.policies.none import NoPolicy
from ftrun.tokens.policies.token_cleaning import TokenCleaning, highest
from ftrun.tokens.run import run_tokens, write_tokens


def losses(model, table) -> np.ndarray:
    """Loss of every trained token of the table at batch size 1, NaN elsewhere."""
    result = np.full(len(table.input_ids), np.nan)
    for index in range(len(table)):
        item, start = table.sequence(index), table.offsets[index]
        ids = torch.tensor(item.input_ids.tolist())
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1].double()
        nll = -torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), ids[1:]].numpy()
        result[start + 1 : start + len(ids)] = np.where(item.loss_weight[1:] > 0, nll, np.nan)
    return result


def expected_scores(bundle, reference_dir, table) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    return losses(bundle.model, table) - losses(AutoModelForCausalLM.from_pretrained(reference_dir).eval(), table)


def test_the_highest_excess_losses_stay(bundle, reference_dir, table, context):
    scores, weights = TokenCleaning(reference=str(reference_dir)).precompute(table, context("token_cleaning"))
    expected = expected_scores(bundle, reference_dir, table)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    trained = np.flatnonzero(~np.isnan(expected))
    kept = trained[np.argsort(-expected[trained], kind="stable")][: int(0.6 * len(trained))]
    assert np.flatnonzero(weights).tolist() == sorted(kept)
    assert (weights[np.asarray(table.loss_weight) == 0] == 0).all()


def test_level_sample_ranks_each_row(bundle, reference_dir, table, context):
    _, weights = TokenCleaning(reference=str(reference_dir), k=0.5, level="sample").precompute(table, context())
    assert table.with_weights(weights).trained_counts().tolist() == [int(0.5 * n) for n in table.trained_counts()]


def test_k_one_is_plain_training(reference_dir, table, context):
    _, weights = TokenCleaning(reference=str(reference_dir), k=1.0).precompute(table, context())
    np.testing.assert_array_equal(table.with_weights(weights).trained_counts(), table.trained_counts())


def test_the_run_folder_names_the_same_model(reference_dir, table, context):
    direct, of_run = (
        TokenCleaning(reference=str(path)).precompute(table, context())[0]
        for path in (reference_dir, reference_dir.parent)
    )
    np.testing.assert_array_equal(direct, of_run)


def test_the_base_as_reference_scores_nothing(tiny_dir, table, context):
    ctx = context()
    scores, weights = TokenCleaning(reference=str(tiny_dir)).precompute(table, ctx)
    assert (scores[~np.isnan(scores)] == 0).all()
    trained = np.flatnonzero(~np.isnan(scores))
    assert np.flatnonzero(weights).tolist() == trained[: int(0.6 * len(trained))].tolist()  # ties go to the earlier
    assert "the run's own model" in ctx.report.warnings[0]


def test_an_adapter_of_a_run_is_put_on_its_base(bundle, tiny_dir, tmp_path, table, context):
    from peft import LoraConfig, get_peft_model

    trained = get_peft_model(copy.deepcopy(bundle.model), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter += 0.3
    trained.save_pretrained(tmp_path / "lora" / "adapter")
    (tmp_path / "lora" / "config.yaml").write_text(f"model:\n  path: {tiny_dir}\n")
    scores, _ = TokenCleaning(reference=str(tmp_path / "lora")).precompute(table, context())
    np.testing.assert_allclose(scores, losses(bundle.model, table) - losses(trained.eval(), table), atol=1e-5)


def test_another_tokenizer_is_refused(reference_dir, table, context):
    file = reference_dir / "tokenizer.json"
    text = file.read_text()
    assert '"!": ' in text
    file.write_text(text.replace('"!": ', '"!!!": ', 1))
    with pytest.raises(ConfigError, match="another tokenizer"):
        TokenCleaning(reference=str(reference_dir)).precompute(table, context())


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({}, "needs a reference model"),
        ({"reference": "x", "k": 0.0}, "a share above 0"),
        ({"reference": "x", "k": 1.5}, "a share above 0"),
    ],
)
def test_wrong_knobs_are_refused(table, context, knobs, message):
    with pytest.raises(ConfigError, match=message):
        TokenCleaning(**knobs).precompute(table, context())


def test_a_folder_without_a_model_is_refused(table, context, tmp_path):
    with pytest.raises(ConfigError, match="holds no model"):
        TokenCleaning(reference=str(tmp_path)).precompute(table, context())


def test_keeping_nothing_is_refused(reference_dir, context):
    one = TokenTable.from_sequences([Sequence(np.array([11, 12], np.int32), np.array([0, 1], np.float32), 0)])
    with pytest.raises(DataError, match="keeps none of 1 trained tokens"):
        TokenCleaning(reference=str(reference_dir), k=0.5).precompute(one, context())


def test_highest_counts_and_ties():
    scores = np.array([np.nan, 1.0, 2.0, np.nan, 2.0, 2.0, 0.0])
    assert np.flatnonzero(highest(scores, 0.4)).tolist() == [2, 4]
    assert np.flatnonzero(highest(scores, 0.99)).tolist() == [1, 2, 4, 5]
    assert np.flatnonzero(highest(scores, 0.5, np.array([0, 3, 7]))).tolist() == [2, 4]


def test_every_token_is_written_down(reference_dir, table, context):
    ctx = context("token_cleaning", {"reference": str(reference_dir)})
    policy = ctx.settings.component("tokens")
    weighed = run_tokens(policy, table, ctx)
    written = pq.read_table(ctx.out / "selection" / "tokens.parquet")
    assert written.schema.names == ["id", "position", "token", "score", "weight"]
    assert written["id"].to_pylist() == np.repeat(table.record, table.lengths).tolist()
    assert written["position"].to_pylist() == [position for length in table.lengths for position in range(length)]
    assert written["token"].to_pylist() == table.input_ids.tolist()
    np.testing.assert_array_equal(written["weight"].to_numpy(), weighed.loss_weight)
    assert written["score"].null_count == len(table.input_ids) - table.trained_counts().sum()
    np.testing.assert_array_equal(weighed.input_ids, table.input_ids)
    assert sorted(file.name for file in (ctx.out / "selection").iterdir()) == ["tokens.json", "tokens.parquet"]


def test_rows_without_a_token_left_are_said(reference_dir, table, context):
    ctx = context("token_cleaning", {"reference": str(reference_dir), "k": 0.05})
    weighed = run_tokens(ctx.settings.component("tokens"), table, ctx)
    emptied = int((weighed.trained_counts() == 0).sum())
    assert emptied > 0
    assert f"{emptied} of 12 sequences have no trained token left" in ctx.report.warnings[0]


def test_a_policy_without_weights_leaves_the_table(table, context):
    ctx = context()
    assert run_tokens(NoPolicy(), table, ctx) is table
    assert not (ctx.out / "selection").exists()


def split(table: TokenTable, limit: int) -> TokenTable:
    """The same texts in pieces of at most ``limit`` tokens."""
    renderer = Renderer(None)
    sequences = [table.sequence(index) for index in range(len(table))]
    return TokenTable.from_sequences([piece for sequence in sequences for piece in renderer.pieces(sequence, limit)])


def test_pieces_of_a_text_are_written_as_one_row(table, tmp_path):
    pieces = split(table, 4)
    assert len(pieces) > len(table)
    written = []
    for name, some in (("whole", table), ("pieces", pieces)):
        write_tokens(tmp_path / name, some, np.zeros(len(some.input_ids)))
        written.append(pq.read_table(tmp_path / name))
    assert written[0].equals(written[1])


def test_level_sample_ranks_a_text_and_not_its_pieces(bundle, reference_dir, table, context):
    pieces = split(table, 4)
    _, weights = TokenCleaning(reference=str(reference_dir), k=0.5, level="sample").precompute(pieces, context())
    kept = pieces.with_weights(weights).trained_counts()
    per_text = np.bincount(pieces.record - 100, weights=kept)
    assert per_text.tolist() == [int(0.5 * n) for n in table.trained_counts()]
