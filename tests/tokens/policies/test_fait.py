"""What differs between programs, which tokens stand for it, and how much they weigh."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from ftrun.config.compose import load
from ftrun.data.batches import micro_batches
from ftrun.data.records import Message, Record
from ftrun.data.render import Renderer
from ftrun.data.tokens import TokenTable
from ftrun.errors import ConfigError, DataError
from ftrun.models.architecture import Architecture
from ftrun.objectives.sft import Sft
from ftrun.tokens.policies.fait import Fait, changed_characters, differences
from ftrun.training.view import StepView

RIGHT = "def fox(a):\n    # the dog\n    if a > 2:\n        return a + 1\n    return 0\n"
WRONG = "def fox(a):\n    # a lazy cat\n    if a  > 2:\n        return a - 10\n    print(a)\n    return 0\n"


def marked(text: str, mask: np.ndarray) -> str:
    return "".join(letter if on else "." for letter, on in zip(text, mask, strict=True)).replace("\n", "|")


# ---- text ----


def test_lines_and_characters_that_differ():
    right, wrong = differences(RIGHT, WRONG, ("#",))
    assert marked(RIGHT, right.line).strip(".") == "        return a + 1"
    assert RIGHT[np.flatnonzero(right.token)[0]] == "+" and right.token.sum() == 1
    lines = [line for line in WRONG.splitlines() if line in marked(WRONG, wrong.line)]
    assert lines == ["        return a - 10", "    print(a)"]
    assert "".join(WRONG[i] for i in np.flatnonzero(wrong.token)) == "-0    print(a)"


def test_equal_programs_and_those_that_differ_in_nothing_that_counts():
    for other in (
        RIGHT,
        RIGHT.replace("# the dog", "# a fox"),
        RIGHT.replace("\n", "  \n"),
        RIGHT.replace(" > ", "  > "),
    ):
        for marks in differences(RIGHT, other, ("#",)):
            assert not marks.line.any() and not marks.token.any()
    indented = differences(RIGHT, RIGHT.replace("    return 0", "        return 0"), ("#",))
    assert indented[1].token.sum() == 4 and indented[0].line.any()


@pytest.mark.parametrize("seed", range(30))
def test_changed_characters_are_a_smallest_edit(seed):
    random = np.random.default_rng(seed)
    one, two = ("".join(random.choice(list("abc"), random.integers(0, 9))) for _ in range(2))
    table = [[max(i, j) if not i or not j else 0 for j in range(len(two) + 1)] for i in range(len(one) + 1)]
    for i in range(1, len(one) + 1):
        for j in range(1, len(two) + 1):
            table[i][j] = min(
                table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (one[i - 1] != two[j - 1])
            )
    ours, theirs = changed_characters(one, two)
    kept = [
        "".join(c for c, gone in zip(text, mask, strict=True) if not gone)
        for text, mask in ((one, ours), (two, theirs))
    ]
    assert kept[0] == kept[1]
    # between two kept characters the shorter side is replaced, and the rest inserted or deleted
    gaps = [[len(run) for run in "".join("x" if gone else "." for gone in mask).split(".")] for mask in (ours, theirs)]
    assert sum(max(pair) for pair in zip(*gaps, strict=True)) == table[-1][-1]


@pytest.mark.parametrize("seed", range(20))
def test_changed_characters_lie_in_changed_lines(seed):
    random = np.random.default_rng(seed)
    lines = ["a = 1", "    b = a + 2", "# so", "", "print(a)", "return b"]
    one, two = ("\n".join(random.choice(lines, random.integers(1, 8))) for _ in range(2))
    for marks in differences(one, two, ("#",)):
        assert not (marks.token & ~marks.line).any()


# ---- tokens and weights ----

PAIRS = [(RIGHT, WRONG), ("return 1", "return 1"), ("a = 1\nb = 2", "a = 1"), ("yes no 3", "yes no 4 and a dog")]


@pytest.fixture
def prepared(bundle, context):
    """The table of the right answers, and a policy that has seen them."""

    def make(pairs=PAIRS, **knobs: Any) -> tuple[Fait, TokenTable]:
        policy, ctx = Fait(**knobs), context()
        records = [
            Record(i, "sft", (Message("user", "what is 2"), Message("assistant", right)), fields={"wrong": wrong})
            for i, (right, wrong) in enumerate(pairs)
        ]
        rows = list(policy.edit(records, ctx))
        folder = ctx.out / "selection"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "edited.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        renderer = Renderer(bundle.tokenizer)
        table = TokenTable.from_sequences([renderer.sequences(record)[0] for record in records])
        table = table.with_remembered(policy.remember(table, ctx))
        ctx.train_tokens = table
        policy.attach(bundle, ctx)
        return policy, table

    return make


def views(bundle, table, batch_tokens=10_000, packing=False) -> list[StepView]:
    batches = micro_batches(table, np.arange(len(table)), batch_tokens, packing, bundle.pad_id)
    return [StepView(bundle.model, bundle.architecture, batch) for batch in batches]


def factors(policy: Fait, made: list[StepView]) -> dict[int, np.ndarray]:
    found = {}
    for view in made:
        _ = view.token_nll
        with torch.no_grad():
            weighed = policy.weigh(view)
        assert not weighed.requires_grad
        for number, row in enumerate(view.batch.table_index.tolist()):
            found[row] = weighed[view.batch.target_sequence == number].numpy()
    return found


def text_of(bundle, table, row: int, name: str) -> str:
    start, end = table.offsets[row], table.offsets[row + 1]
    ids = table.input_ids[start:end][table.remembered[name][start:end] > 0]
    return bundle.tokenizer.decode(ids)


def test_marked_tokens_hold_the_marked_characters(prepared, bundle):
    _, table = prepared()
    assert text_of(bundle, table, 0, "line").strip() == "return a + 1"
    assert text_of(bundle, table, 0, "token").strip() == "+"
    assert not text_of(bundle, table, 1, "line")
    assert text_of(bundle, table, 2, "token").strip() == "b = 2"
    assert text_of(bundle, table, 3, "token").strip() == "3"
    assert not (table.remembered["token"] > table.remembered["line"]).any()
    assert not ((table.remembered["line"] > 0) & (table.loss_weight == 0)).any()


def test_weights_follow_the_formula(prepared, bundle):
    policy, table = prepared(alpha_line=0.3, alpha_token=0.4, w_max=1.6)
    renderer = Renderer(bundle.tokenizer)

    def losses(text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids and losses of a conversation with this answer."""
        record = Record(0, "sft", (Message("user", "what is 2"), Message("assistant", text)))
        ids = renderer.sequences(record)[0].input_ids.astype(np.int64)
        with torch.no_grad():
            logits = bundle.model(torch.tensor(ids)[None]).logits[0, :-1].double()
        return ids, np.array([0.0, *(-torch.log_softmax(logits, -1)[range(len(ids) - 1), ids[1:]]).tolist()])

    found = factors(policy, views(bundle, table))
    # row 3: the last word of the right answer, and in the wrong one what stands there instead
    (ids, ours), (wrong_ids, theirs) = losses(PAIRS[3][0]), losses(PAIRS[3][1])
    marks = table.remembered["token"][table.offsets[3] : table.offsets[4]] > 0
    lines = table.remembered["line"][table.offsets[3] : table.offsets[4]] > 0
    # from the first changed character to the end of the answer
    shared = next(i for i, (a, b) in enumerate(zip(ids, wrong_ids, strict=False)) if a != b)
    first = int(np.flatnonzero(lines)[0])
    tail = len(wrong_ids) - 2  # the end of turn and the line break after it
    r = ours[lines].mean() / theirs[first:tail].mean()
    expected = np.clip(1 + 0.3 * lines * r + 0.4 * marks * r, 1, 1.6)
    trained = table.loss_weight[table.offsets[3] : table.offsets[4]] > 0
    np.testing.assert_allclose(found[3], expected[trained], rtol=1e-4)
    assert shared <= int(np.flatnonzero(marks)[0])
    assert (found[1] == 1).all()  # equal programs: plain training
    # row 2: nothing of the wrong program is marked, so r is 1
    marks, lines = (table.remembered[name][table.offsets[2] : table.offsets[3]] for name in ("token", "line"))
    trained = table.loss_weight[table.offsets[2] : table.offsets[3]] > 0
    np.testing.assert_allclose(found[2], np.clip(1 + 0.3 * lines + 0.4 * marks, 1, 1.6)[trained], rtol=1e-6)


@pytest.mark.parametrize("way", [{"batch_tokens": 1}, {"packing": True}])
def test_the_cut_and_packing_do_not_matter(way, prepared, bundle):
    policy, table = prepared()
    whole, cut = factors(policy, views(bundle, table)), factors(policy, views(bundle, table, **way))
    for row in whole:
        np.testing.assert_allclose(whole[row], cut[row], rtol=1e-5)
    assert (whole[0] > 1).any()


def test_wrong_answers_share_batches_no_larger_than_those_of_the_right_ones(prepared, bundle, monkeypatch):
    long = ("return 1", "return 2\n" + "print(a)\n" * 20)
    policy, table = prepared([*PAIRS, long, *PAIRS])
    (view,) = views(bundle, table)
    sizes, hidden_states = [], Architecture.hidden_states

    def kept(self, model, batch):
        sizes.append(tuple(batch.input_ids.shape))
        return hidden_states(self, model, batch)

    monkeypatch.setattr(Architecture, "hidden_states", kept)
    together = policy._wrong_nll(view)
    assert 1 < len(sizes) < torch.isfinite(together).sum()
    assert all(rows == 1 or rows * time <= view.batch.input_ids.numel() for rows, time in sizes)
    alone = {int(v.batch.table_index): policy._wrong_nll(v) for v in views(bundle, table, batch_tokens=1)}
    expected = torch.cat([alone[row] for row in view.batch.table_index.tolist()])
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_alpha_zero_is_plain_training(prepared, bundle):
    policy, table = prepared(alpha_line=0.0, alpha_token=0.0)
    assert all((values == 1).all() for values in factors(policy, views(bundle, table)).values())


def test_wrong_programs_are_no_targets_and_give_no_gradient(prepared, bundle):
    policy, table = prepared()
    renderer = Renderer(bundle.tokenizer)
    record = Record(0, "sft", (Message("user", "what is 2"), Message("assistant", RIGHT)))
    plain = renderer.sequences(record)[0]
    np.testing.assert_array_equal(table.sequence(0).input_ids, plain.input_ids)
    np.testing.assert_array_equal(table.sequence(0).loss_weight, plain.loss_weight)
    bundle.model.requires_grad_(True).train()
    (view,) = views(bundle, table)
    _ = view.token_nll
    with torch.no_grad():
        factor = view.factors = policy.weigh(view)
    assert bundle.model.training
    fixed = (factor.clone() * view.token_nll).sum()
    weight = bundle.model.get_input_embeddings().weight
    ours, theirs = (torch.autograd.grad(v, weight, retain_graph=True)[0] for v in (Sft().loss(view).value, fixed))
    torch.testing.assert_close(ours, theirs)


def test_a_row_without_a_wrong_answer_is_refused(context):
    record = Record(7, "sft", (Message("user", "a"), Message("assistant", "b")), fields={"wrong": " "})
    with pytest.raises(DataError, match="row 7 has no wrong answer"):
        list(Fait().edit([record], context()))


@pytest.mark.parametrize("knobs", [{"alpha_line": -1.0}, {"alpha_token": -0.1}, {"w_max": 0.5}])
def test_wrong_knobs_are_refused(knobs):
    with pytest.raises(ConfigError):
        Fait(**knobs)


def test_only_token_losses_can_be_weighed():
    with pytest.raises(ConfigError, match="weighs the loss of every token"):
        load(["objective=dpo", "tokens=fait"])
