"""Easy data augmentation: what each operation does, and what it never touches."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

import ftrun
from ftrun.data.records import Message, Record
from ftrun.errors import ConfigError
from ftrun.tokens.policies.eda import OPERATIONS, Eda, Synonyms

TEXT = "the quick brown fox\njumps over 12 lazy dogs, and then it rests at home  "
WORDS = TEXT.split()


@pytest.fixture
def synonyms(monkeypatch) -> Synonyms:
    """Words with vectors in the plane: the neighbours of one are known."""
    words = ["fox", "Fox", "wolf", "dog", "cat", "home", "house", "rests"]
    angles = np.array([0, 0.01, 0.1, 0.2, 0.3, 2.0, 2.1, 4.0])
    found = Synonyms(words, np.stack([np.cos(angles), np.sin(angles)], 1))
    monkeypatch.setattr(Synonyms, "of_model", lambda _ctx: found)
    return found


def row(id: int = 0, asked: str = TEXT) -> Record:
    messages = (Message("system", "be brief"), Message("user", asked), Message("assistant", "answers: yes"))
    return Record(id, "sft", messages=messages)


def after(operation: str, synonyms: Synonyms, seed: int = 0, text: str = TEXT, **knobs) -> str:
    return Eda(**knobs).augmented(text, operation, np.random.default_rng(seed), synonyms)


def test_neighbours_are_other_words_nearest_first(synonyms):
    near = synonyms.near("home")
    assert near[0] == "house" and "home" not in near and len(near) == 5
    assert "Fox" not in synonyms.near("fox") and synonyms.near("unknown") == []
    centred = synonyms.vectors @ synonyms.vectors[0]
    others = [at for at in np.argsort(-centred, kind="stable") if synonyms.words[at] not in ("fox", "Fox")]
    assert synonyms.near("fox") == [synonyms.words[at] for at in others[:5]]


@pytest.mark.parametrize("seed", range(8))
def test_swap_moves_words_and_nothing_else(synonyms, seed):
    changed = after("swap", synonyms, seed)
    assert Counter(changed.split()) == Counter(WORDS)
    assert sum(a != b for a, b in zip(changed.split(), WORDS, strict=True)) <= 2 * max(1, int(0.1 * len(WORDS)))
    assert changed.split()[6] == "12" and changed.count("\n") == 1 and changed.endswith("  ")


@pytest.mark.parametrize("seed", range(8))
def test_deletion_leaves_the_rest_in_order(synonyms, seed):
    left = after("deletion", synonyms, seed, alpha=0.4).split()
    words = iter(WORDS)
    assert all(word in words for word in left) and "12" in left


def test_deletion_leaves_no_blank_where_the_first_word_was(synonyms):
    texts = [after("deletion", synonyms, seed, alpha=0.7) for seed in range(20)]
    assert any(not text.startswith("the") for text in texts)
    assert all(text == text.lstrip() for text in texts)


def test_deletion_takes_each_word_with_probability_alpha(synonyms):
    text = " ".join(["word"] * 2000)
    assert len(after("deletion", synonyms, text=text, alpha=0.3).split()) == pytest.approx(1400, abs=60)
    assert after("deletion", synonyms, text="only words here", alpha=1.0).split()[0] in ("only", "words", "here")


@pytest.mark.parametrize("seed", range(8))
def test_a_synonym_replaces_words_that_have_one(synonyms, seed):
    changed = after("synonym", synonyms, seed).split()
    differ = [(a, b) for a, b in zip(WORDS, changed, strict=True) if a != b]
    assert len(differ) == max(1, int(0.1 * len(WORDS)))
    assert all(b in synonyms.near(a) for a, b in differ)


def test_punctuation_around_a_replaced_word_stays(synonyms):
    assert (
        after("synonym", synonyms, text='a "fox," ran')[:3] == 'a "'
        and after("synonym", synonyms, text='"fox,"')[-2:] == ',"'
    )


@pytest.mark.parametrize("seed", range(8))
def test_insertion_adds_synonyms_of_the_text_s_words(synonyms, seed):
    added = Counter(after("insertion", synonyms, seed, alpha=0.2).split()) - Counter(WORDS)
    known = {near for word in ("fox", "rests", "home") for near in synonyms.near(word)}
    assert added.total() == int(0.2 * len(WORDS)) and added.keys() <= known


@pytest.mark.parametrize("knobs", [{"alpha": 0.0}, {"n_aug": 0}])
def test_nothing_to_do_is_the_data_itself(context, knobs):
    rows = list(Eda(**knobs).edit([row(0), row(1)], context()))
    assert [line["row"] for line in rows] == [0, 1]
    assert [line["messages"][1]["content"] for line in rows] == [TEXT, TEXT]


def test_only_the_prompt_changes_and_every_copy_names_its_row(context, synonyms):
    rows = list(Eda(n_aug=8, alpha=0.3).edit([row(7)], context()))
    assert rows[0]["messages"][1]["content"] == TEXT and "augmentation" not in rows[0]
    copies = rows[1:]
    assert len(copies) > 5 and {line["augmentation"] for line in copies} <= set(OPERATIONS)
    for line in copies:
        assert line["row"] == 7 and line["messages"][1]["content"] != TEXT
        assert line["messages"][0]["content"] == "be brief" and line["messages"][2]["content"] == "answers: yes"


def test_of_a_labelled_row_the_text_changes(context, synonyms):
    record = Record(3, "labels", text="a fox rests at home", text_pair="a dog", label="good")
    rows = list(Eda().edit([record], context()))
    assert rows[0] == {"text": "a fox rests at home", "text_pair": "a dog", "label": "good", "row": 3}
    assert {(line["label"], line["text_pair"], line["row"]) for line in rows} == {("good", "a dog", 3)}


def test_the_seed_and_the_text_decide(context, synonyms):
    ctx = context()
    policy = Eda()
    both = list(policy.edit([row(0), row(1, "other words that stand here")], ctx))
    swapped = list(policy.edit([row(1, "other words that stand here"), row(0)], ctx))
    key = lambda line: (line["row"], line["messages"][1]["content"])  # noqa: E731
    assert sorted(both, key=key) == sorted(swapped, key=key)
    ctx.settings.seed = 1
    assert list(policy.edit([row(0), row(1, "other words that stand here")], ctx)) != both


def test_copies_that_do_not_change_are_said(context, synonyms):
    ctx = context()
    rows = list(Eda(operations=["swap"], n_aug=3).edit([row(0, "one")], ctx))
    assert len(rows) == 1
    assert "3 copies came out as they went in" in ctx.report.console.file.getvalue()


def test_synonyms_of_the_model_are_whole_words_of_its_vocabulary(context, bundle):
    found = Synonyms.of_model(context())
    assert len(found.words) > 10 and "quick" in found.words
    for word in found.words:
        assert len(bundle.tokenizer(f" {word}", add_special_tokens=False).input_ids) == 1


def test_bad_knobs_and_rows_are_refused(context):
    for knobs in ({"alpha": 1.5}, {"alpha": -0.1}, {"n_aug": -1}, {"operations": []}, {"operations": ["translate"]}):
        with pytest.raises(ConfigError, match="tokens"):
            Eda(**knobs)
    with pytest.raises(ConfigError, match="row 4 has neither"):
        list(Eda(operations=["swap"]).edit([Record(4, "text", text="a b")], context()))


def test_held_out_rows_stay_as_they_are(tiny_encoder_dir, labels_file, tmp_path):
    """What is evaluated is the same with and without copies, and no copy is of a held-out row."""
    words = ["recipe=augment_peft", f"model.path={tiny_encoder_dir}", f"data.path={labels_file}"]
    words += ["data.heldout=0.3", "train.max_steps=1", "train.batch_size=4"]
    judged = []
    for name, more in (("with", "tokens.alpha=0.5"), ("without", "tokens=none")):
        ftrun.run("train", overrides=[*words, more, f"out={tmp_path / name}"])
        lines = (tmp_path / name / "eval/predictions/classification.jsonl").read_text().splitlines()
        judged.append([(line["id"], line["gold"]) for line in map(json.loads, lines)])
    assert judged[0] == judged[1] and judged[0]
    edited = [json.loads(line) for line in (tmp_path / "with/selection/edited.jsonl").read_text().splitlines()]
    assert any("augmentation" in row for row in edited)
    assert not {row["row"] for row in edited} & {id for id, _ in judged[0]}
    assert not list((tmp_path / "with/selection").glob("*heldout*"))
