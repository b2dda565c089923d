"""Prompts of symbol tuning."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import ftrun
from ftrun.data.pool import load_pool
from ftrun.data.records import Record
from ftrun.data.render import Renderer
from ftrun.errors import ConfigError, DataError
from ftrun.tokens.policies.symbol_tuning import TEMPLATES, Symbols, SymbolTuning
from ftrun.tokens.run import edit_rows

WORDS = ["quick", "brown", "jumps", "table", "chair"]
LABELS = ("nice", "awful", "soso")


def rows(count: int = 30, task: str | None = None, labels=LABELS) -> list[Record]:
    fields = {} if task is None else {"task": task}
    made = []
    for i in range(count):
        text, label = f"<{task or ''}{i}>", labels[i % len(labels)]
        made.append(Record(i, "labels", text=text, label=label, fields=fields | {"text": text, "label": label}))
    return made


def edited(policy: SymbolTuning, records: list[Record], ctx) -> list[dict]:
    return list(policy.edit(records, ctx))


def parts(line: dict) -> tuple[list[str], str]:
    """The examples of a prompt, the query being the last, and the answer."""
    asked, answer = line["messages"]
    return asked["content"].split("\n\n"), answer["content"]


def test_training_and_evaluation_share_no_symbol():
    train, heldout = Symbols(WORDS, False), Symbols(WORDS, True)
    first = [train[at] for at in range(len(train))]
    assert len(set(first)) == len(first) == 10_000 + 26 + 26**2 + 26**3 + 3
    step = range(0, len(heldout), 97)
    assert not {heldout[at] for at in [*step, len(heldout) - 1, len(heldout) - 2]} & set(first)
    assert [heldout[at] for at in (0, 89_999, 90_000, len(heldout) - 1)] == ["10000", "99999", "aaaa", "quick"]


def test_every_prompt_has_a_mapping_of_its_own(context):
    lines = edited(SymbolTuning(), rows(), context())
    assert [line["row"] for line in lines] == list(range(30))
    for line in lines:
        symbols = line["symbols"]
        assert set(symbols) == set(LABELS) and len(set(symbols.values())) == 3
        shown, answer = parts(line)
        assert answer == symbols[line["label"]]
        for example in shown[:-1]:
            number = int(example.split("<")[1].split(">")[0])
            assert example.endswith(f" {symbols[LABELS[number % 3]]}"), example
            assert number != line["row"]
    assert len({json.dumps(line["symbols"]) for line in lines}) == 30


def test_prompts_hold_no_label_and_end_before_the_symbol(context):
    for line in edited(SymbolTuning(), rows(), context()):
        shown, _ = parts(line)
        assert not any(label in part for label in LABELS for part in shown)
        template = next(
            t
            for t in TEMPLATES
            if t.partition("{label}")[0].replace("{text}", f"<{line['row']}>").rstrip() == shown[-1]
        )
        assert all(part.startswith(template.partition("{text}")[0]) for part in shown)


def test_two_to_ten_examples_of_each_class(context):
    counts = []
    for line in edited(SymbolTuning(least=2, most=5), rows(60), context()):
        shown = [int(part.split("<")[1].split(">")[0]) for part in parts(line)[0][:-1]]
        assert len(set(shown)) == len(shown)
        counts += np.bincount(np.array(shown) % 3, minlength=3).tolist()
    assert set(counts) == {2, 3, 4, 5}


def test_examples_come_from_the_task_of_the_query(context):
    records = [*rows(8, "one", ("a1", "b1")), *rows(8, "two", ("a2", "b2"))]
    records = [replace(record, id=at) for at, record in enumerate(records)]
    for line in edited(SymbolTuning(), records, context()):
        assert all(f"<{line['task']}" in part for part in parts(line)[0])


def test_rows_that_say_the_same_as_the_query_are_no_examples(context):
    records = [
        replace(record, text="<1>" if at < 6 else record.text) for at, record in enumerate(rows(12, None, ("a", "b")))
    ]
    for line in edited(SymbolTuning(), records, context())[:6]:
        assert sum("<1>" in part for part in parts(line)[0]) == 1


def test_draws_differ_and_nothing_else_does(context):
    ctx = context()
    policy = SymbolTuning(draws=3)
    lines = edited(policy, rows(), ctx)
    assert len(lines) == 90 and len({json.dumps(line["messages"]) for line in lines}) == 90
    assert lines == edited(policy, rows(), ctx)
    assert lines[:30] == edited(SymbolTuning(), rows(), ctx)
    ctx.settings.seed = 1
    assert lines != edited(policy, rows(), ctx)


def test_held_out_rows_have_symbols_of_their_own(context):
    ctx = context()
    ctx.heldout = rows()
    lines = edited(SymbolTuning(draws=3), ctx.heldout, ctx)
    assert len(lines) == 30
    for symbol in (symbol for line in lines for symbol in line["symbols"].values()):
        assert (symbol.isdigit() and len(symbol) == 5) or (symbol.isalpha() and len(symbol) >= 4)


def test_only_the_symbol_is_trained(context, bundle):
    line = edited(SymbolTuning(), rows(), context())[0]
    from ftrun.data.readers import READERS

    [sequence] = Renderer(bundle.tokenizer).sequences(READERS["messages"](line))
    trained = sequence.input_ids[np.asarray(sequence.loss_weight) > 0]
    assert bundle.tokenizer.decode(trained) == line["messages"][1]["content"] + "<|im_end|>"


def test_classes_without_another_row_are_left_out_and_counted(context):
    ctx = context()
    lone = [*rows(6, None, ("a", "b")), Record(6, "labels", text="<6>", label="c")]
    assert len(edited(SymbolTuning(), lone, ctx)) == 6
    assert edited(SymbolTuning(), rows(6, None, ("a",)), ctx) == []
    assert "1 prompts are left out" in ctx.report.warnings[0] and "6 prompts" in ctx.report.warnings[1]


def test_a_symbol_is_never_the_name_of_a_label():
    class Small(Symbols):
        def __len__(self) -> int:
            return 4

    drawn = Small([], False).draw([0, 1], np.random.default_rng(0))
    assert set(drawn.values()) == {"2", "3"}


def test_instructions_are_mixed_in_by_share(context, rows_file, labels_file):
    ctx = context()
    lines = edited(SymbolTuning(instructions=str(rows_file), share=0.6), rows(), ctx)
    assert sum("mixed_in" in line for line in lines) == 20
    assert len(lines) == 50
    edited(SymbolTuning(instructions=str(rows_file)), rows(), ctx)
    assert "would take 158 rows" in ctx.report.warnings[0]
    with pytest.raises(DataError, match="labels rows, not instructions"):
        edited(SymbolTuning(instructions=str(labels_file)), rows(), ctx)


def test_labelled_rows_become_rows_to_fine_tune_on(context, labels_file, tmp_path):
    ctx = context("symbol_tuning")
    ctx.settings.data = replace(ctx.settings.data, path=str(labels_file), format="classification")
    pool = load_pool(ctx.settings.data, tmp_path / "work", 0)
    edited_pool = edit_rows(SymbolTuning(), pool, ctx)
    assert pool.kind == "labels" and edited_pool.kind == "sft" and len(edited_pool) == len(pool)


def test_other_rows_are_refused(tiny_dir, rows_file, tmp_path):
    overrides = ["recipe=symbol_tuning", f"model.path={tiny_dir}", f"data.path={rows_file}", f"out={tmp_path / 'run'}"]
    with pytest.raises(DataError, match="tokens=symbol_tuning works on labels rows; these are sft rows"):
        ftrun.run("train", overrides=[*overrides, "data.format=auto"])


@pytest.mark.parametrize("knobs", [{"least": 0}, {"least": 3, "most": 2}, {"draws": 0}, {"share": 0.0}])
def test_wrong_knobs_are_refused(knobs):
    with pytest.raises(ConfigError):
        SymbolTuning(**knobs)
