"""Multiverse: paths are found in any tokenizer's tokens, do not see each other, and stand side by side."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import ftrun
from ftrun.data.batches import Batch, micro_batches
from ftrun.data.tokens import Sequence, TokenTable
from ftrun.errors import DataError
from ftrun.tokens.policies.multiverse import MalformedError, Multiverse, TagReader, key_characters, paths_in, positions
from ftrun.training.view import StepView

PROMPT = "what is 1 plus 2"


def block(*paths: str, goal: str = "<Outline>1: a</Outline>", conclusion: str = "yes") -> str:
    written = "\n".join(f"<Path>{path}</Path>" for path in paths)
    return f"<Parallel>\n<Goal>{goal}</Goal>\n{written}\n<Conclusion>{conclusion}</Conclusion></Parallel>"


ANSWERS = {
    "two": "then " + block("1: the quick fox", "2: a dog"),
    "three": block("1: a", "2: the lazy dog jumps", "3: fox") + " and no",
    "again": block("1: a", "2: dog") + " then " + block("1: quick brown", "2: fox", conclusion="no"),
    "nested": block("1: a", "2: " + block("1: the fox jumps", "2: over", "3: a") + " dog") + " 7",
    "none": "answers: yes no 3",
}


class Builder:
    """Tables whose answers are these texts, and where their characters stand."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def sequence(self, *turns: str, record: int = 0) -> Sequence:
        """A prompt and an answer, and so on."""
        parts = [self.ids(turn) for turn in turns]
        weight = np.concatenate([np.full(len(part), float(number % 2)) for number, part in enumerate(parts)])
        return Sequence(np.concatenate(parts).astype(np.int32), weight.astype(np.float32), record)

    def table(self, *answers: str) -> TokenTable:
        return TokenTable.from_sequences(
            [self.sequence(PROMPT, answer, record=number) for number, answer in enumerate(answers)]
        )


@pytest.fixture
def build(bundle) -> Builder:
    return Builder(bundle.tokenizer)


@pytest.fixture
def arranged(context, bundle):
    """The batches of a table as the policy leaves them, and the table that it weighed."""

    def make(table: TokenTable, batch_tokens: int = 10_000, packing: bool = False, **knobs):
        policy, ctx = Multiverse(**knobs), context()
        _, weights = policy.precompute(table, ctx)
        weighed = table.with_weights(weights)
        weighed = weighed.with_remembered(policy.remember(weighed, ctx))
        cut = micro_batches(weighed, np.arange(len(table)), batch_tokens, packing, bundle.pad_id)
        return [policy.arrange(batch, (0, 0), 0.5) for batch in cut], weighed

    return make


def one(arranged, table: TokenTable, **knobs) -> Batch:
    (batch,), _ = arranged(table, **knobs)
    return batch


# ---- reading tags ----


def test_paths_of_a_text():
    text = "so " + block("1: a", "2: b") + " and " + block("1: c " + block("1: d", "2: e"), "2: f")
    found = paths_in(text)
    assert [(p.block, p.number, p.depth) for p in found] == [
        (1, 1, 1), (1, 2, 1), (2, 1, 1), (3, 1, 2), (3, 2, 2), (2, 2, 1),
    ]  # fmt: skip
    assert [text[p.start : p.end].strip() for p in found[:2]] == ["<Path>1: a</Path>", "<Path>2: b</Path>"]
    assert text[found[0].end :].startswith("<Path>2") and text[found[1].end :].startswith("<Conclusion>")
    assert paths_in("no tags, but a < b and <b>bold</b>") == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<Path>1</Path>", "<Path> stands alone"),
        ("<Parallel><Path>1 <Path>2</Path></Path></Parallel>", "<Path> stands in <Path>"),
        ("<Parallel><Path>1</Path>", "<Parallel> is never closed"),
        ("<Parallel><Path>1</Parallel>", "</Parallel> closes <Path>"),
        ("so </Conclusion>", "</Conclusion> closes nothing"),
        ("<Parallel><Path>1</Path> and <Path>2</Path></Parallel>", "between two paths"),
        ("<Parallel><Path>1</Path><Conclusion>x</Conclusion><Path>2</Path></Parallel>", "between two paths"),
        ("<Parallel><Outline>1</Outline></Parallel>", "<Outline> stands in <Parallel>"),
    ],
)
def test_tags_that_do_not_nest(text, words):
    with pytest.raises(MalformedError, match=words):
        paths_in(text)


def test_a_token_belongs_where_its_first_sign_stands():
    texts = ["a", "</Path", "><", "Path", ">\n", " <", "", "  ", "b"]
    assert key_characters(texts).tolist() == [0, 1, 7, 9, 13, 16, 17, 17, 19]


def other_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Tokenizers that cut tags quite differently."""
    text = "".join(sorted(set("".join(ANSWERS.values()) + PROMPT)))
    pieces = {
        "characters": list(text),
        "straddling": [*text, "><", ">\n<", " <", "Pa", "th", "</", "Path>", "Conclusion"],
        "tags": [*text, "<Path>", "</Path>", "<Parallel>", "</Parallel>", "</Path>\n", "<Conclusion>"],
    }[kind]
    made = Tokenizer(
        models.WordLevel({piece: number for number, piece in enumerate(dict.fromkeys(pieces))}, unk_token="a")
    )
    longest = sorted(map(re_escape, dict.fromkeys(pieces)), key=len, reverse=True)
    made.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(longest)), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def re_escape(text: str) -> str:
    return "".join("\\" + sign if sign in "<>/\\.+*?()[]{}|^$" else sign for sign in text)


@pytest.mark.parametrize("kind", ["characters", "straddling", "tags"])
@pytest.mark.parametrize("name", ["two", "three", "again", "nested"])
def test_paths_are_found_whatever_the_tokens_are(kind, name):
    """The tokens of each path spell it, but for those that hold its edge and its neighbour's."""
    build = Builder(other_tokenizer(kind))
    sequence = build.sequence(PROMPT, ANSWERS[name])
    found = list(TagReader(build.tokenizer).paths(sequence))
    spelled = paths_in(ANSWERS[name])
    assert len(found) == len(spelled)
    for path, of_text in zip(found, spelled, strict=True):
        assert (path.block, path.number, path.depth) == (of_text.block, of_text.number, of_text.depth)
        text = "".join(
            str(build.tokenizer.decode([token])) for token in sequence.input_ids[path.start : path.end].tolist()
        )
        wanted = ANSWERS[name][of_text.start : of_text.end].strip()
        assert text.strip() == wanted or (kind == "straddling" and wanted[1:-1] in text)


def test_the_real_tokenizer(build):
    """Byte-level BPE, with letters that are several tokens long in between."""
    answer = "ü€ " + block("1: naïve 😀", "2: ok") + " ✓"
    sequence = build.sequence("<Path>in a prompt means nothing", answer)
    first, second = TagReader(build.tokenizer).paths(sequence)
    texts = [build.tokenizer.decode(sequence.input_ids[p.start : p.end].tolist()).strip() for p in (first, second)]
    assert texts == ["<Path>1: naïve 😀</Path>", "<Path>2: ok</Path>"]


def test_every_answer_of_a_conversation_has_its_blocks(build):
    sequence = build.sequence(PROMPT, ANSWERS["two"], "and then", ANSWERS["again"])
    assert [path.block for path in TagReader(build.tokenizer).paths(sequence)] == [1, 1, 2, 2, 3, 3]


# ---- positions, mask, borders: against the definition, token by token ----


def ancestors(texts: list[str]) -> list[list[tuple[int, int]]]:
    """(block, path) of every token from outside in, by walking the text with a stack of its own."""
    whole = "".join(texts)
    of_character: list[list[tuple[int, int]]] = []
    stack: list[list[int]] = []  # block, paths begun; inside a path or not
    inside: list[bool] = []
    blocks = 0
    position = 0
    while position < len(whole):
        rest = whole[position:]
        if rest.startswith("<Parallel>"):
            blocks += 1
            stack.append([blocks, 0])
            inside.append(False)
        elif rest.startswith("<Path>"):
            stack[-1][1] += 1
            inside[-1] = True
        elif rest.startswith("</Parallel>"):
            stack.pop()
            inside.pop()
        of_character.append([(b, n) for (b, n), within in zip(stack, inside, strict=True) if within])
        position += 1
        if whole[:position].endswith("</Path>"):
            while position < len(whole) and whole[position].isspace():
                of_character.append([(b, n) for (b, n), within in zip(stack, inside, strict=True) if within])
                position += 1
            inside[-1] = False
    found, at = [], 0
    for text in texts:
        found.append(of_character[at + len(text) - len(text.lstrip()) if text.strip() else at])
        at += len(text)
    return found


def layout(item: Sequence, tokenizer) -> list[list[tuple[int, int]]]:
    texts = [tokenizer.decode([token]) for token in item.input_ids.tolist()]
    start = int(np.argmax(item.loss_weight > 0))
    return [[] for _ in range(start)] + ancestors(texts[start:])


@pytest.mark.parametrize("packing", [False, True])
def test_mask_is_that_of_the_definition(packing, arranged, build):
    table = build.table(*ANSWERS.values())
    (batch,), _ = arranged(table, packing=packing)
    for number, row in enumerate(batch.table_index.tolist()):
        where = layout(table.sequence(row), build.tokenizer)
        (line, first), *_ = (batch.sequence == number).nonzero().tolist()
        for query in range(len(where)):
            expected = []
            for key in range(query + 1):
                paths = dict(where[query])
                expected.append(all(paths.get(b, n) == n for b, n in where[key]))
            seen = batch.attention[line, first + query]
            assert seen[first : first + query + 1].tolist() == expected
            assert not seen[:first].any() and not seen[first + query + 1 :].any()


def test_positions_by_the_definition(arranged, build):
    """A token follows the one before it in its path, a path's first the one before the block's paths, and what
    comes after a block the furthest of its tokens."""
    table = build.table(*ANSWERS.values())
    (batch,), _ = arranged(table)
    for number, row in enumerate(batch.table_index.tolist()):
        where = layout(table.sequence(row), build.tokenizer)
        found = batch.position_ids[batch.sequence == number].tolist()
        visible = batch.attention[number][:, : len(where)]
        for token in range(len(where)):
            before = [found[key] for key in range(token) if visible[token, key]]
            assert found[token] == (max(before) + 1 if before else 0), (row, token)


def test_positions_of_a_nested_block():
    paths = [
        *paths_in(
            "<Parallel><Path>ab<Parallel><Path>c</Path><Path>def</Path></Parallel>g</Path><Path>h</Path></Parallel>i"
        )
    ]
    small = [
        type(p)(p.block, p.number, p.depth, *edges)
        for p, edges in zip(paths, [(2, 9), (3, 4), (4, 7), (9, 11)], strict=True)
    ]
    #            0  1 | 2 | 3 | 4  5  6 | 7  8 | 9 10 | 11 12
    expected = [0, 1, 2, 3, 3, 4, 5, 6, 7, 2, 3, 8, 9]
    assert positions(13, small).tolist() == expected


@pytest.mark.parametrize("learn_borders", [False, True])
def test_what_follows_a_path_is_no_target(learn_borders, arranged, build):
    table = build.table(*ANSWERS.values())
    _, weighed = arranged(table, learn_borders=learn_borders)
    for row in range(len(table)):
        item = table.sequence(row)
        where = layout(item, build.tokenizer)
        left = [t for t in range(1, len(where)) if not set(where[t - 1]) <= set(where[t])]
        expected = item.loss_weight.copy()
        if not learn_borders:
            expected[left] = 0
        assert weighed.sequence(row).loss_weight.tolist() == expected.tolist()
    assert (weighed.trained_counts() < table.trained_counts()).tolist() == [not learn_borders] * 4 + [False]


# ---- the model ----


def logits(bundle, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return bundle.architecture.head(bundle.model).logits(bundle.architecture.hidden_states(bundle.model, batch))


def spans(bundle, item: Sequence) -> list[slice]:
    return [slice(path.start, path.end) for path in TagReader(bundle.tokenizer).paths(item)]


def test_a_path_does_not_notice_its_siblings(bundle, arranged, build):
    before = build.sequence(PROMPT, block("1: the quick fox", "2: a dog"))
    after = build.sequence(PROMPT, block("1: yes yes yes no", "2: a dog"))
    found = [logits(bundle, one(arranged, TokenTable.from_sequences([item]))) for item in (before, after)]
    (_, second), (_, other) = spans(bundle, before), spans(bundle, after)
    torch.testing.assert_close(found[0][0, second], found[1][0, other], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[0][0, second.stop :][:3], found[1][0, other.stop :][:3], atol=1e-4)


def test_siblings_may_change_places(bundle, arranged, build):
    """The conclusion and all after it are as before."""
    paths = ["a dog", "the quick fox jumps", "no"]
    found = []
    for order in ([0, 1, 2], [2, 0, 1]):
        item = build.sequence(PROMPT, block(*(paths[i] for i in order)) + " and yes")
        end = spans(bundle, item)[-1].stop
        found.append(logits(bundle, one(arranged, TokenTable.from_sequences([item])))[0, end:])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_path_alone_is_the_path_among_siblings(bundle, arranged, build):
    """As a decoder would run it: the text before the block's paths, and this one."""
    item = build.sequence(PROMPT, ANSWERS["three"])
    batch = one(arranged, TokenTable.from_sequences([item]))
    together = logits(bundle, batch)[0]
    paths = spans(bundle, item)
    for path in paths:
        ids = torch.cat([batch.input_ids[0, : paths[0].start], batch.input_ids[0, path]])
        with torch.no_grad():
            alone = bundle.model(ids[None]).logits[0, paths[0].start :]
        torch.testing.assert_close(together[path], alone, rtol=1e-5, atol=1e-5)


def test_rows_without_tags_are_plain(bundle, arranged, build):
    table = build.table(ANSWERS["none"], "yes no 4")
    (batch,), weighed = arranged(table)
    assert batch.attention is None and weighed.remembered == {}
    assert weighed.loss_weight.tolist() == table.loss_weight.tolist()
    assert torch.equal(batch.position_ids, next(iter(micro_batches(table, np.arange(2), 999, False, 3))).position_ids)


def test_plain_rows_beside_others_stay_plain(bundle, arranged, build):
    """In one micro-batch, apart or packed, the row without tags has the loss that it has alone."""
    table = build.table(*ANSWERS.values())
    plain = collate_one(table, 4)
    expected = StepView(bundle.model, bundle.architecture, plain).token_nll
    for packing in (False, True):
        (batch,), _ = arranged(table, packing=packing)
        number = batch.table_index.tolist().index(4)
        nll = StepView(bundle.model, bundle.architecture, batch).token_nll[batch.target_sequence == number]
        torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-5)


def collate_one(table: TokenTable, row: int) -> Batch:
    return next(iter(micro_batches(table, np.array([row]), 10_000, False, 0)))


def test_packing_and_the_cut_do_not_matter(bundle, arranged, build):
    table = build.table(*ANSWERS.values())
    found = []
    for tokens, packing in ((10_000, False), (1, False), (10_000, True)):
        of_row = {}
        for batch in arranged(table, tokens, packing)[0]:
            nll = StepView(bundle.model, bundle.architecture, batch).token_nll.detach()
            of_row |= {row: nll[batch.target_sequence == n] for n, row in enumerate(batch.table_index.tolist())}
        found.append(torch.cat([of_row[row] for row in sorted(of_row)]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)


def test_broken_rows(arranged, build, context):
    table = build.table(ANSWERS["two"], "<Parallel><Path>1: a</Parallel>", "yes")
    with pytest.raises(DataError, match="the tags of 1 of 3 rows do not nest") as error:
        arranged(table)
    assert error.value.where == "row 1: </Parallel> closes <Path>"
    batches, weighed = arranged(table, malformed="plain", batch_tokens=1)
    assert [batch.attention is None for batch in batches if int(batch.table_index) == 1] == [True]
    assert weighed.sequence(1).loss_weight.tolist() == table.sequence(1).loss_weight.tolist()


# ---- through the loop ----

QUICK = ["eval=[]", "data.heldout=0", "data.max_length=400", "train.batch_size=5", "train.max_steps=3"]


@pytest.fixture
def traces(tmp_path) -> Path:
    file = tmp_path / "traces.jsonl"
    rows = [{"instruction": PROMPT, "input": "", "output": answer} for answer in ANSWERS.values()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def losses(tiny_dir: Path, data: Path, out: Path, *more: str) -> list[float]:
    words = ["recipe=sft", f"model.path={tiny_dir}", f"data.path={data}", f"out={out}", *QUICK, *more]
    ftrun.run("train", overrides=words)
    lines = [json.loads(line) for line in (out / "train/metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_without_tags_a_run_is_sft(tiny_dir, rows_file, tmp_path):
    plain = losses(tiny_dir, rows_file, tmp_path / "sft")
    assert losses(tiny_dir, rows_file, tmp_path / "multiverse", "tokens=multiverse") == plain


@pytest.mark.slow
def test_a_run_does_not_depend_on_the_cut(tiny_dir, traces, tmp_path):
    more = ("tokens=multiverse", "adapter=lora")
    whole = losses(tiny_dir, traces, tmp_path / "whole", *more, "train.packing=false")
    for cut in ("train.batch_tokens=1", "train.packing=true", "train.gradient_checkpointing=true"):
        found = losses(tiny_dir, traces, tmp_path / cut, *more, cut)
        np.testing.assert_allclose(whole, found, rtol=1e-5, atol=1e-5, err_msg=cut)


def test_the_run_says_what_it_found(tiny_dir, traces, tmp_path):
    out = tmp_path / "run"
    losses(tiny_dir, traces, out, "tokens=multiverse")
    assert "4 of 5 rows have parallel paths" in (out / "ftrun.log").read_text()
    table = pq.read_table(out / "selection/tokens.parquet")
    assert {"parallel_position", "block_1", "path_1", "block_2", "path_2"} <= set(table.column_names)
    plain = table.filter(np.asarray(table["id"]) == 4)
    assert plain["parallel_position"].null_count == len(plain)
