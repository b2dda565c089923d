"""The preflight keeps what can be trained, refuses or counts the rest, and caches by content."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from ftrun.config.settings import DataConfig
from ftrun.data.pool import load_pool
from ftrun.data.prepare import NO_ROOM, TOO_LONG, prepare
from ftrun.data.render import Renderer
from ftrun.data.tokens import TokenTable
from ftrun.errors import ConfigError, DataError
from ftrun.runs.artifacts import MANIFEST


@pytest.fixture
def ready(tokenizer, tmp_path):
    """Prepare rows as a run would; the context holds 512 tokens."""

    def run(rows, vocab_size=None, labels=None, report=None, ids=None, **data):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = DataConfig(path=str(path), **({"max_length": 512} | data))
        pool = load_pool(config, tmp_path / "work", 0)
        pool = pool if ids is None else pool.subset(ids)
        return prepare(
            pool,
            tokenizer,
            config,
            context_length=512,
            vocab_size=vocab_size or len(tokenizer),
            folder=tmp_path / "tokens",
            labels=labels,
            report=report,
        )

    return run


def row(prompt: int, response: int) -> dict[str, str]:
    """A row of about these many tokens ("the" is one, " the" another)."""
    return {"instruction": "what" + " the" * prompt, "output": "fox" + " the" * response}


def test_table_equals_rendering_row_by_row(ready, rows, tokenizer):
    prepared = ready(rows)
    expected = TokenTable.from_sequences(
        [Renderer(tokenizer).sequences(_record(number, fields))[0] for number, fields in enumerate(rows)]
    )
    assert prepared.table.fingerprint() == expected.fingerprint()
    assert prepared.table.record.tolist() == prepared.kept.tolist() == list(range(len(rows)))
    assert not prepared.dropped and not prepared.notes and isinstance(prepared.table.input_ids, np.memmap)


def _record(number, fields):
    from ftrun.data.formats import layout_of

    return layout_of(fields, "", "auto", {}, None).record(number, fields, "")


def test_subset_keeps_ids_and_has_its_own_cache(ready, rows):
    whole, part = ready(rows), ready(rows, ids=[7, 3])
    assert part.kept.tolist() == [7, 3]
    assert part.table.fingerprint() == whole.table.rows(np.array([7, 3])).fingerprint()


def test_pairs_are_neighbours(ready):
    prepared = ready([{"prompt": f"what {n}", "chosen": "yes " * (n + 1), "rejected": "no"} for n in range(4)])
    assert len(prepared.table) == 4 and prepared.table.sequences_per_row == 2
    assert prepared.table.record.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and prepared.kept.tolist() == [0, 1, 2, 3]


def test_labels_are_sorted_and_shared_with_heldout_rows(ready):
    rows = [{"text": f"the fox {n}", "label": label} for n, label in enumerate(["yes", "no", "yes"])]
    prepared = ready(rows)
    assert prepared.labels == ["no", "yes"] and prepared.table.label.tolist() == [1, 0, 1]
    held = ready(rows[:1], labels=prepared.labels)
    assert held.table.label.tolist() == [1]
    with pytest.raises(DataError, match='label "yes"'):
        ready(rows, labels=["no"])
    assert ready([{"text": "the", "label": number} for number in (10, 9, 9)]).labels == [9, 10]


def test_prompts_need_nothing_trained(ready):
    prepared = ready([{"prompt": "what is 1 plus 2", "answer": "3"}])
    assert len(prepared.table) == 1 and not prepared.table.trained_counts().any()


# ---- too long ----

SHORT = [row(3, 3 + n) for n in range(9)]
LONG, PROMPT = row(3, 100), row(100, 3)


def test_max_length_beyond_the_context(ready):
    with pytest.raises(ConfigError, match="513 is more than the 512") as caught:
        ready(SHORT, max_length=513)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("overlong", ["auto", "error"])
def test_many_long_rows_are_refused(ready, overlong, tmp_path):
    with pytest.raises(
        DataError, match=r"2 of 11 rows are longer than data.max_length=64; in 1 of them the response starts after that"
    ) as caught:
        ready([*SHORT, LONG, PROMPT], max_length=64, overlong=overlong)
    assert (
        "rows.jsonl:10 (row 9, 1" in caught.value.where
        and "row 10" in caught.value.where
        and "overlong=drop" in caught.value.todo
    )
    assert not any((tmp_path / "tokens").iterdir())


def test_few_long_rows_are_dropped_by_auto_and_refused_by_error(ready):
    rows = [row(3, n % 40) | {"number": n} for n in range(99)] + [LONG]
    prepared = ready(rows, max_length=64)
    assert prepared.dropped == {TOO_LONG: [99]} and prepared.kept.tolist() == list(range(99))
    assert prepared.notes == ["1 of 100 rows dropped: longer than max_length=64"]
    with pytest.raises(DataError, match="1 of 100"):
        ready(rows, max_length=64, overlong="error")


def test_drop(ready):
    prepared = ready([LONG, *SHORT, PROMPT], max_length=64, overlong="drop")
    assert prepared.dropped == {TOO_LONG: [0], NO_ROOM: [10]} and prepared.kept.tolist() == list(range(1, 10))
    assert len(prepared.notes) == 2


def test_truncate_cuts_and_counts(ready):
    whole, prepared = ready([LONG, *SHORT]), ready([LONG, *SHORT], max_length=64, overlong="truncate")
    assert prepared.truncated == [0] and not prepared.dropped and "1 of 10 rows cut" in prepared.notes[0]
    assert prepared.table.sequence(0).input_ids.tolist() == whole.table.sequence(0).input_ids[:64].tolist()
    assert prepared.table.trained_counts()[0] > 0


def test_truncate_never_leaves_a_row_without_a_response(ready):
    with pytest.raises(DataError, match=r"1 of 10 rows are longer.*in 1 of them the response") as caught:
        ready([PROMPT, *SHORT], max_length=64, overlong="truncate")
    assert "cannot be cut" in caught.value.todo
    many = [row(3, n % 40) | {"number": n} for n in range(99)] + [PROMPT]
    assert ready(many, max_length=64, overlong="truncate").dropped == {NO_ROOM: [99]}


def test_a_pair_is_dropped_as_one(ready):
    rows = [{"prompt": "what", "chosen": "yes", "rejected": "no" + " the" * size} for size in (1, 100)]
    prepared = ready(rows, max_length=64, overlong="drop")
    assert prepared.dropped == {TOO_LONG: [1]} and prepared.table.record.tolist() == [0, 0]


def test_nothing_left(ready):
    with pytest.raises(DataError, match="1 of 1 rows"):
        ready([PROMPT], max_length=64, overlong="drop")


def test_labelled_text_is_cut_by_its_tokenizer(ready, tokenizer):
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", tokenizer.eos_token_id)]
    )
    prepared = ready([{"text": "fox" + " the" * 100, "label": "a"}], max_length=64, overlong="truncate")
    assert len(prepared.table.input_ids) == 64 and prepared.table.input_ids[-1] == tokenizer.eos_token_id


# ---- other refusals ----


def test_all_tokens_masked(ready, monkeypatch):
    unmasked = Renderer.batch

    def masked(self, records, where):
        made = unmasked(self, records, where)
        made[2][0].loss_weight[:] = 0
        return made

    monkeypatch.setattr(Renderer, "batch", masked)
    with pytest.raises(DataError, match=r"row 2 of .*rows.jsonl has nothing to train on") as caught:
        ready(SHORT)
    assert caught.value.where.endswith("rows.jsonl:3") and caught.value.exit_code == 3


def test_vocabularies_that_disagree(ready, tokenizer):
    with pytest.raises(DataError, match="tokenizer and model do not fit: row 0"):
        ready(SHORT, vocab_size=50)
    assert len(ready(SHORT, vocab_size=len(tokenizer) + 100).table) == 9


def test_max_length_defaults_to_the_context(ready):
    assert ready([row(3, 400)], max_length=None).kept.tolist() == [0]
    with pytest.raises(DataError, match=r"data\.max_length=512"):
        ready([row(3, 600)], max_length=None)


def test_no_rows(ready):
    with pytest.raises(DataError, match="no rows"):
        ready(SHORT, ids=[])


# ---- the cache ----


def test_cache_is_used_only_when_whole_and_fitting(ready, rows, monkeypatch, tokenizer, tmp_path):
    first = ready(rows)
    folder = next(path for path in (tmp_path / "tokens").iterdir())
    calls = []
    unspied = Renderer.batch
    monkeypatch.setattr(Renderer, "batch", lambda self, *rest: calls.append(1) or unspied(self, *rest))
    assert ready(rows).table.fingerprint() == first.table.fingerprint() and not calls

    (folder / MANIFEST).unlink()  # as if killed before the end
    assert ready(rows).table.fingerprint() == first.table.fingerprint() and calls

    def made_anew(**data):
        calls.clear()
        ready(rows, **data)
        return bool(calls)

    assert (
        made_anew(max_length=400)
        and made_anew(train_on="all")
        and made_anew(system="be kind")
        and made_anew(ids=[0, 1])
    )
    tokenizer.chat_template += "{# another #}"
    assert made_anew()
    calls.clear()
    ready([*rows[1:], rows[0]])
    assert calls and not made_anew(heldout=0.5, weights=[2.0])  # what does not touch the tokens does not matter


def test_cached_counts_are_told_again(ready):
    rows = [LONG, *SHORT]
    first, second = (ready(rows, max_length=64, overlong="drop") for _ in range(2))
    assert first.dropped == second.dropped and first.notes == second.notes


def test_failed_preflight_leaves_nothing(ready, tmp_path):
    with pytest.raises(DataError):
        ready([LONG, *SHORT], max_length=64)
    assert list((tmp_path / "tokens").iterdir()) == []


def test_progress_is_told(ready, rows):
    from io import StringIO

    from ftrun.runs.progress import Reporter

    text = StringIO()
    ready(rows, report=Reporter(stream=text, live=False))
    assert "tokenising" in text.getvalue()


RESPONSES = [
    "yes",
    "def f(x):\n    return x  # café\n",
    "1. one\n2. two\n\n**three**",
    "ご飯 🙂",
    '{"a": [1, 2]}',
    "  two  spaces ",
]


def test_what_is_trained_reads_as_the_response(tokenizer, tmp_path):
    """Code, lists, other scripts, emoji and spaces at the ends; but for rows that were cut, down to the character."""
    file = tmp_path / "rows.jsonl"
    rows = [
        {
            "instruction": RESPONSES[(i + 1) % 6] * (1 + i % 4),
            "input": RESPONSES[i % 5] if i % 2 else "",
            "output": RESPONSES[i % 6] * (1 + i % 7),
        }
        for i in range(42)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(path=str(file), max_length=160, overlong="truncate")
    pool = load_pool(config, tmp_path / "work", 0)
    size = {"context_length": 2048, "vocab_size": len(tokenizer)}
    prepared = prepare(pool, tokenizer, config, **size, folder=tmp_path / "tokens")
    assert 0 < len(prepared.truncated) < 21
    for index in range(len(prepared.table)):
        sequence = prepared.table.sequence(index)
        if sequence.record not in prepared.truncated:
            trained = tokenizer.decode(sequence.input_ids[sequence.loss_weight > 0])
            assert trained == pool[sequence.record].response + "<|im_end|>"


# ---- long texts ----

TEXTS = [{"text": "the fox" + " the" * count} for count in (0, 3, 61, 200, 9)]


@pytest.mark.parametrize("max_length", [2, 3, 16, 64])
def test_every_token_of_a_long_text_is_a_target_once(ready, max_length):
    whole, split = ready(TEXTS).table, ready(TEXTS, max_length=max_length)
    table, continues = split.table, split.table.continues
    assert table.lengths.max() <= max_length and table.lengths.min() >= 2
    assert split.kept.tolist() == list(range(5)) and len(table) == len(table.record) > 5
    for row in range(5):
        pieces = [table.sequence(int(index)) for index in np.flatnonzero(table.record == row)]
        text = whole.sequence(row)
        targets = np.concatenate([piece.input_ids[1:] for piece in pieces])
        assert targets.tolist() == text.input_ids[1:].tolist()
        assert all((piece.loss_weight[1:] == 1).all() and piece.loss_weight[0] == 0 for piece in pieces)
        for before, after in itertools.pairwise(pieces):
            assert after.input_ids[0] == before.input_ids[-1] and len(before.input_ids) == max_length
    assert table.trained_counts().sum() == whole.trained_counts().sum()
    assert continues.tolist() == [False, *(table.record[1:] == table.record[:-1])]


def test_split_texts_are_counted(ready):
    prepared = ready(TEXTS, max_length=64)
    lengths = [len(ready(TEXTS).table.sequence(row).input_ids) for row in range(5)]
    pieces = [-(-(length - 1) // 63) for length in lengths]
    long = [count for count in pieces if count > 1]
    assert len(prepared.table) == sum(pieces) and not prepared.dropped and not prepared.truncated
    assert prepared.notes == [
        f"{len(long)} of 5 rows split into {sum(long)} pieces of at most data.max_length=64 tokens"
    ]


def test_a_text_as_long_as_the_limit_stays_whole(ready):
    length = len(ready(TEXTS).table.sequence(3).input_ids)
    assert len(ready(TEXTS, max_length=length).table) == 5
    assert len(ready(TEXTS, max_length=length - 1).table) == 6


def test_long_texts_obey_an_explicit_setting(ready):
    with pytest.raises(DataError, match=r"1 of 5 rows are longer than data\.max_length=100"):
        ready(TEXTS, max_length=100, overlong="error")
    assert ready(TEXTS, max_length=100, overlong="drop").dropped == {TOO_LONG: [3]}
    cut = ready(TEXTS, max_length=100, overlong="truncate")
    assert cut.truncated == [3] and cut.table.lengths.max() == 100 and len(cut.table) == 5
