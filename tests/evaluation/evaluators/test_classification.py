"""Accuracy and F1 of a tiny BERT."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import ConfigError, DataError
from ftrun.evaluation.averages import macro_f1
from ftrun.evaluation.evaluators.classification import Classification
from ftrun.models.architecture import describe
from ftrun.models.bundle import Bundle


@pytest.fixture(scope="module")
def classifier(tiny_dir):
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=384, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    config.id2label = {0: "bad", 1: "fair", 2: "good"}
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    return Bundle(model, tokenizer, describe(model), torch.device("cpu"), torch.float32, "tiny", "0" * 16, 512)


@pytest.fixture
def labelled():
    generator = np.random.default_rng(0)
    sequences = []
    for row in range(20):
        length = int(generator.integers(2, 30))
        ids = generator.integers(4, 250, length).astype(np.int32)
        sequences.append(Sequence(ids, np.zeros(length, np.float32), row, label=int(generator.integers(0, 3))))
    return TokenTable.from_sequences(sequences)


def test_equals_one_row_at_a_time(classifier, context, labelled):
    answers, losses = [], []
    for index in range(20):
        ids = torch.tensor(labelled.sequence(index).input_ids, dtype=torch.long)[None]
        with torch.no_grad():
            logits = classifier.model(input_ids=ids).logits[0].double()
        answers.append(int(logits.argmax()))
        losses.append(float(-logits.log_softmax(-1)[labelled.sequence(index).label]))
    assert len(set(answers)) > 1, "a test of a classifier that always says the same would be empty"
    reference = None
    for batch_tokens in (1, 100, 10_000):
        found = Classification(batch_tokens=batch_tokens).evaluate(classifier, context(heldout_tokens=labelled))
        assert [prediction["output"] for prediction in found.predictions] == [
            classifier.model.config.id2label[answer] for answer in answers
        ]
        assert found.metrics["accuracy"].value == np.mean(np.array(answers) == labelled.label)
        assert found.metrics["macro_f1"].value == pytest.approx(f1_score(labelled.label, answers, average="macro"))
        assert found.metrics["loss"].value == pytest.approx(np.mean(losses), abs=1e-5)
        assert not found.metrics["loss"].higher_is_better
        probabilities = [prediction["probability"] for prediction in found.predictions]
        assert reference is None or probabilities == pytest.approx(reference, abs=1e-5)
        reference = probabilities


def test_processes_agree(classifier, context, labelled, alone):
    reference = Classification(batch_tokens=60).evaluate(classifier, context(heldout_tokens=labelled))
    shares = []
    for rank in range(2):
        team = alone(rank, 2)
        with pytest.raises(KeyError):  # a process alone lacks the other's rows
            Classification(batch_tokens=60).evaluate(classifier, context(team, heldout_tokens=labelled))
        shares.append(team.given[0])
    found = Classification(batch_tokens=60).evaluate(
        classifier, context(alone(1, 2, gathered=[shares]), heldout_tokens=labelled)
    )
    assert found == reference


def test_macro_f1_equals_scikit_learn():
    generator = np.random.default_rng(1)
    for classes in (2, 5):
        gold, answers = generator.integers(0, classes, 40), generator.integers(0, classes - 1, 40)
        assert macro_f1(gold, answers) == pytest.approx(f1_score(gold, answers, average="macro"))


def test_rows_without_labels_are_refused(classifier, context, table):
    with pytest.raises(DataError, match="row 100 has no label"):
        Classification().evaluate(classifier, context(heldout_tokens=table))
    with pytest.raises(ConfigError, match="none were held out"):
        Classification().evaluate(classifier, context())
