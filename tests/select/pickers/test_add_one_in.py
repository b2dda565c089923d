"""add_one_in with choosers that are played, and with a server that is."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ftrun import cli
from ftrun.errors import ComponentError, ConfigError, DataError
from ftrun.select.base import Budget, Table
from ftrun.select.pickers.add_one_in import AddOneIn, chosen_option, one_line
from ftrun.select.row_numbers import row_numbers
from ftrun.select.trials import chooser
from ftrun.select.trials.chooser import LocalChooser, RemoteChooser


class Played:
    """Answers by a rule, and remembers the questions."""

    def __init__(self, rule: Callable[[str, list[str]], str]):
        self.rule, self.questions = rule, []

    def answer(self, question: str, letters: list[str]) -> str:
        self.questions.append(question)
        return self.rule(question, letters)


@pytest.fixture
def pool(make_pool):
    return make_pool([{"instruction": f"what is {i}", "output": f"row number {i}."} for i in range(60)])


@pytest.fixture
def pick(pool, context, monkeypatch):
    def run(played: Played, rows: int, picker: AddOneIn, ctx: Any = None, lengths: Any = None, budget: Any = None):
        monkeypatch.setattr(AddOneIn, "_chooser", lambda self, ctx: played)
        table = Table({}, np.ones(60, np.int64) if lengths is None else lengths, pool)
        return picker.pick(table, np.arange(60), "", budget or Budget(rows=rows), ctx or context()).tolist()

    return run


def options(question: str) -> list[int]:
    return [int(number) for number in re.findall(r"^\[[A-Z]\].*row number (\d+)\.$", question, re.M)]


def shown(question: str) -> list[int]:
    return [int(number) for number in re.findall(r"^\d+\. .*row number (\d+)\.$", question, re.M)]


def test_the_set_grows_by_one_row_a_question(pick, pool):
    played = Played(lambda question, letters: "[[A]] since it is new")
    picked = pick(played, 20, AddOneIn(shown=4, options=5, shards=1))
    assert len(picked) == len(set(picked)) == 20
    assert len(played.questions) == 20 - 4  # all answers are valid
    by_content = np.argsort(row_numbers(pool, 0, "add_one_in")).tolist()
    assert picked[:4] == by_content[:4]
    for step, question in enumerate(played.questions):
        chosen = picked[: 4 + step]
        assert len(shown(question)) == 4 and set(shown(question)) <= set(chosen)
        assert len(options(question)) == 5 and not set(options(question)) & set(chosen)
        assert picked[4 + step] == options(question)[0]


def test_the_named_option_joins(pick):
    played = Played(lambda question, letters: f"The best is [{letters[np.argmax(options(question))]}].")
    picked = pick(played, 15, AddOneIn(shown=4, options=26, shards=1))
    assert picked[4:] == [max(options(question)) for question in played.questions]


def test_a_chooser_that_always_says_a_grows_at_random(pick, context):
    """Over many seeds every row is picked as often as any other."""
    counts = np.zeros(60)
    for seed in range(60):
        counts[
            pick(
                Played(lambda question, letters: "[A]"), 20, AddOneIn(shown=5, options=5, shards=2), context(seed=seed)
            )
        ] += 1
    expected = 60 * 20 / 60
    assert (
        (counts - expected) ** 2 / (expected * (1 - 1 / 3))
    ).sum() < 98.3  # chi-square, 59 degrees of freedom, p = 0.001


def test_shards_share_the_budget_and_stay_apart(pick, pool):
    played = Played(lambda question, letters: "[B]")
    picked = pick(played, 41, AddOneIn(shown=5, options=5, shards=4))
    order = np.argsort(row_numbers(pool, 0, "add_one_in"))
    parts = [set(order[number::4].tolist()) for number in range(4)]
    assert sorted(len(part & set(picked)) for part in parts) == [10, 10, 10, 11]
    for question in played.questions:
        assert sum(bool(part & {*shown(question), *options(question)}) for part in parts) == 1


def test_everything_is_picked_when_the_budget_covers_it(pick):
    assert sorted(pick(Played(lambda question, letters: "[A]"), 60, AddOneIn(shown=5, options=5))) == list(range(60))


def test_tokens_are_a_budget(pick):
    lengths = np.random.default_rng(0).integers(5, 50, 60)
    picked = pick(
        Played(lambda q, letters: "[A]"), 0, AddOneIn(shown=3, options=5, shards=2), None, lengths, Budget(tokens=500)
    )
    assert 450 < lengths[picked].sum() <= 500


def test_invalid_answers_change_nothing_and_are_counted(pick, context):
    turns = iter(range(1000))
    ctx = context()
    answers = ["no idea", "[[Z]]", "[C]"]
    played = Played(lambda question, letters: answers[next(turns) % 3])
    picked = pick(played, 14, AddOneIn(shown=4, options=5, shards=1), ctx)
    assert len(played.questions) == 3 * 10
    assert picked[4:] == [options(question)[2] for question in played.questions[2::3]]
    assert ctx.facts["chooser"] == {"answers": 30, "invalid": 20}
    assert "30 answers, 20 of them invalid (66.7%)" in ctx.report.console.file.getvalue()


def test_a_chooser_that_never_names_an_option_ends_it(pick):
    played = Played(lambda question, letters: "I cannot say")
    with pytest.raises(ComponentError, match="named none of its options 4 times") as caught:
        pick(played, 20, AddOneIn(shown=4, options=5, shards=2, retries=3))
    assert "I cannot say" in str(caught.value) and "select.picker.answer=letter" in str(caught.value)
    assert len(played.questions) == 4


def test_the_order_of_the_pool_does_not_matter(make_pool, context, monkeypatch):
    monkeypatch.setattr(AddOneIn, "_chooser", lambda self, ctx: Played(lambda question, letters: "[C]"))
    rows = [{"instruction": f"what is {i}", "output": f"row number {i}."} for i in range(40)]
    order = np.random.default_rng(1).permutation(40)
    picks = []
    for permuted in (rows, [rows[i] for i in order]):
        pool = make_pool(permuted)
        table = Table({}, np.ones(40, np.int64), pool)
        picked = AddOneIn(shown=4, options=5, shards=2).pick(table, np.arange(40), "", Budget(rows=16), context())
        picks.append([pool.fields(place)["output"] for place in picked.tolist()])
    assert picks[0] == picks[1]


def test_several_processes_pick_as_one(pool, context, together, monkeypatch):
    monkeypatch.setattr(AddOneIn, "_chooser", lambda self, ctx: Played(lambda question, letters: "[C]"))
    table = Table({}, np.ones(60, np.int64), pool)

    def work(team):
        ctx = context(team=team) if team else context()
        picked = AddOneIn(shown=4, options=5, shards=3).pick(table, np.arange(60), "", Budget(rows=30), ctx)
        return picked.tolist(), ctx.facts["chooser"]

    alone = work(None)
    assert together(2, work) == [alone, alone]


def test_few_rows_make_fewer_shards_and_too_few_are_refused(pick, context):
    ctx = context()
    pick(Played(lambda question, letters: "[A]"), 20, AddOneIn(shown=5, options=5, shards=8), ctx)
    assert "2 shard(s) instead of 8" in ctx.report.console.file.getvalue()
    with pytest.raises(ConfigError, match="drawn at random before the first choice"):
        pick(Played(lambda question, letters: "[A]"), 5, AddOneIn(shown=5, options=5))


@pytest.mark.parametrize(
    ("answer", "option"),
    [
        ("[[B]] it is", 1),
        ("[B]", 1),
        ("[ c ] or [A]", 2),
        ("B", None),
        ("[[E]]", None),
        ("[AB] then [D]", 3),
        ("", None),
    ],
)
def test_brackets(answer, option):
    assert chosen_option(answer, 4) == option


def test_a_row_is_one_line(pick, context):
    assert one_line(["a\nb", " c\t d "], 99) == "a b c d"
    assert one_line(["abcdef"], 4) == "abcd…"
    played, ctx = Played(lambda question, letters: "[A]"), context()
    pick(played, 12, AddOneIn(shown=4, options=5, shards=1, row_length=9), ctx)
    assert "what is 1 row" not in "".join(played.questions)
    assert "60 of 60 rows by their first 9 characters" in ctx.report.console.file.getvalue()


@pytest.mark.parametrize(
    "knobs",
    [
        {"shown": 0},
        {"options": 27},
        {"shards": 0},
        {"timeout": 0.0},
        {"retries": -1},
        {"chooser_url": "http://localhost:1/v1"},
    ],
    ids=repr,
)
def test_impossible_knobs_are_refused(knobs):
    with pytest.raises(ConfigError):
        AddOneIn(**knobs)


# ---- the scoring model as chooser ----


def test_the_local_model_writes_greedily(context, bundle):
    ctx = context()
    question = "what is [A] or [B]"
    answer = LocalChooser(ctx.scorer, 6).answer(question, ["A", "B"])
    import torch

    text = bundle.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    ids = start = bundle.tokenizer(text, add_special_tokens=False).input_ids
    for _ in range(6):
        with torch.no_grad():
            ids = [*ids, int(bundle.model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == bundle.tokenizer.eos_token_id:
            break
    assert answer == bundle.tokenizer.decode(ids[len(start) :], skip_special_tokens=True)


def test_what_the_model_suggests_for_generation_does_not_count(context, bundle):
    """Chat models come with a repetition penalty; the chooser writes the likeliest tokens all the same."""
    plain = LocalChooser(context().scorer, 8).answer("yes yes yes", ["A"])
    bundle.model.generation_config.repetition_penalty = 5.0
    bundle.model.generation_config.no_repeat_ngram_size = 1
    assert LocalChooser(context().scorer, 8).answer("yes yes yes", ["A"]) == plain


def test_the_likeliest_letter_follows_the_opening_bracket(context, bundle):
    import torch

    text = bundle.tokenizer.apply_chat_template(
        [{"role": "user", "content": "which"}], tokenize=False, add_generation_prompt=True
    )
    ids = bundle.tokenizer(text, add_special_tokens=False).input_ids + bundle.tokenizer("[").input_ids
    with torch.no_grad():
        logits = bundle.model(torch.tensor([ids])).logits[0, -1]
    letters = list("ABCDEFG")
    best = max(letters, key=lambda letter: float(logits[bundle.tokenizer(letter).input_ids[0]]))
    assert LocalChooser(context().scorer, 6, "letter").answer("which", letters) == f"[{best}]"


def test_a_question_that_does_not_fit_is_refused(context):
    with pytest.raises(DataError, match="do not fit into the 512"):
        LocalChooser(context().scorer, 600).answer("which", ["A"])


def test_answers_are_kept_for_the_next_attempt(pool, context, monkeypatch, tmp_path):
    """A run that was killed asks only what was not answered."""
    turns = iter(range(1000))

    def breaks(question, letters):
        if next(turns) == 6:
            raise KeyboardInterrupt
        return "[B]"

    table, picker = Table({}, np.ones(60, np.int64), pool), AddOneIn(shown=4, options=5, shards=1)
    asked = []
    for rule in (breaks, lambda question, letters: "[B]"):
        played, ctx = Played(rule), context()
        ctx.scorer.shards = tmp_path / "shards"
        monkeypatch.setattr(AddOneIn, "_chooser", lambda self, ctx, played=played: played)
        try:
            picker.pick(table, np.arange(60), "", Budget(rows=20), ctx)
        except KeyboardInterrupt:
            with next((tmp_path / "shards").glob("answers-*.jsonl")).open("a") as lines:
                lines.write('["half a li')
        asked.append(len(played.questions))
    assert asked == [7, 10]


# ---- a chooser behind an address ----


@pytest.fixture
def server() -> Iterator[Any]:
    """An OpenAI-compatible server; ``replies`` are given out in turn, the last one for ever."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            made.seen.append((self.path, dict(self.headers), json.loads(body)))
            status, content = made.replies[0] if len(made.replies) == 1 else made.replies.pop(0)
            reply = content if isinstance(content, str) else json.dumps(content)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(reply.encode())

        def log_message(self, *_: Any) -> None:
            return

    made: Any = HTTPServer(("127.0.0.1", 0), Handler)
    made.seen, made.replies = [], [(200, {"choices": [{"message": {"content": "[[B]] because"}}]})]
    made.url = f"http://127.0.0.1:{made.server_port}/v1"
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


def test_a_server_is_asked_as_openai_is(server, monkeypatch):
    monkeypatch.setenv("FTRUN_CHOOSER_KEY", "secret")
    chosen = RemoteChooser(server.url, "big", 1024, 5.0)
    assert chosen.answer("which?", ["A", "B"]) == "[[B]] because"
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body == {
        "model": "big",
        "messages": [{"role": "user", "content": "which?"}],
        "temperature": 0,
        "max_tokens": 1024,
    }
    assert "secret" not in repr(chosen)


def test_without_a_key_none_is_sent(server, monkeypatch):
    monkeypatch.delenv("FTRUN_CHOOSER_KEY", raising=False)
    RemoteChooser(server.url + "/chat/completions/", "big", 8, 5.0).answer("which?", ["A"])
    assert server.seen[0][0] == "/v1/chat/completions" and "Authorization" not in server.seen[0][1]


def test_a_busy_server_is_asked_again(server):
    server.replies = [(503, "busy"), (429, "slow down"), *server.replies]
    assert RemoteChooser(server.url, "big", 8, 5.0, first_wait=0.01).answer("which?", ["A"]) == "[[B]] because"
    assert len(server.seen) == 3


def test_a_server_that_stays_busy_is_an_error(server):
    server.replies = [(503, "busy")]
    with pytest.raises(ComponentError, match="3 attempts: HTTP 503: busy"):
        RemoteChooser(server.url, "big", 8, 5.0, attempts=3, first_wait=0.01).answer("which?", ["A"])


def test_a_refusal_is_an_error_at_once(server):
    server.replies = [(401, "who are you")]
    with pytest.raises(ComponentError, match="HTTP 401: who are you") as caught:
        RemoteChooser(server.url, "big", 8, 5.0).answer("which?", ["A"])
    assert len(server.seen) == 1 and "FTRUN_CHOOSER_KEY" in caught.value.todo


@pytest.mark.parametrize("reply", ["<html>", {"choices": []}, {"error": "x"}])
def test_an_answer_of_another_kind_is_an_error(server, reply):
    server.replies = [(200, reply)]
    with pytest.raises(ComponentError, match="not that of a chat completion"):
        RemoteChooser(server.url, "big", 8, 5.0).answer("which?", ["A"])


def test_nobody_at_the_address(server):
    url = server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(ComponentError, match="cannot be reached, 2 attempts"):
        RemoteChooser(url, "big", 8, 5.0, attempts=2, first_wait=0.01).answer("which?", ["A"])


def test_the_address_must_be_one():
    with pytest.raises(ConfigError, match="chooser_url"):
        RemoteChooser("file:///etc/passwd", "big", 8, 5.0)


def test_a_server_waits_are_bounded():
    assert [chooser._asked_wait(header, 2.0) for header in ("5", "9999", "-1", "nan", "Wed, 21 Oct", None)] == [
        5,
        60,
        2,
        2,
        2,
        2,
    ]


def test_picking_through_a_server(server, pool, context):
    table = Table({}, np.ones(60, np.int64), pool)
    picker = AddOneIn(shown=3, options=4, shards=2, chooser_url=server.url, chooser_model="big", timeout=5)
    picked = picker.pick(table, np.arange(60), "", Budget(rows=12), context()).tolist()
    assert len(set(picked)) == 12 and len(server.seen) == 6
    second = {options(body["messages"][0]["content"])[1] for _, _, body in server.seen}
    assert second == set(picked[6:])


def said(answer: str | None) -> tuple[int, Any]:
    return 200, {"choices": [{"message": {"content": answer}}]}


def choose(server, tiny_dir, rows_file, out, *more: str) -> int:
    words = ["recipe=add_one_in", f"model.path={tiny_dir}", f"data.path={rows_file}", "budget=9", f"out={out}"]
    knobs = {"shown": 3, "options": 4, "shards": 1, "chooser_url": server.url, "chooser_model": "big"}
    return cli.entry(["select", *words, *(f"select.picker.{name}={value}" for name, value in knobs.items()), *more])


def test_a_selection_through_a_server_that_errs(server, rows, tiny_dir, rows_file, tmp_path, monkeypatch, capsys):
    """The command line against a server that is busy, evades, names what is not offered, and then answers."""
    monkeypatch.setenv("FTRUN_CHOOSER_KEY", "secret")
    waits: list[float] = []
    monkeypatch.setattr(chooser, "time", SimpleNamespace(sleep=waits.append))
    server.replies = [(429, "slow down"), said("I like them all"), said("[[Z]]"), said(None), said("[C] is new")]
    server.replies += [(500, "oops"), said("[[B]] because")]
    out = tmp_path / "run"
    assert choose(server, tiny_dir, rows_file, out) == 0, capsys.readouterr().err
    assert len(server.seen) == 2 + 3 + 6 and waits == [1, 1]  # busy, of no use, valid
    assert {headers["Authorization"] for _, headers, _ in server.seen} == {"Bearer secret"}
    asked = [body["messages"][0]["content"] for _, _, body in server.seen]
    assert asked[0] == asked[1] and asked[5] == asked[6]  # a busy server gets the same question again
    assert len(set(asked)) == 9  # after an answer of no use the rows are drawn anew
    named = [
        re.search(rf"^\[{letter}\] (.*)$", asked[turn], re.M)[1]
        for turn, letter in ((4, "C"), *((turn, "B") for turn in range(6, 11)))
    ]
    chosen = [json.loads(line) for line in (out / "selection/selected.jsonl").read_text().splitlines()]
    lines = [" ".join(f"{row['instruction']} {row['input']} {row['output']}".split()) for row in chosen]
    assert len(chosen) == 9 and lines[3:] == named
    assert "the chooser gave 9 answers, 3 of them invalid" in (out / "ftrun.log").read_text()
    files = [file for file in out.rglob("*") if file.is_file()]
    assert not [file for file in files if b"secret" in file.read_bytes()]  # the key is written nowhere


def test_a_refusal_ends_the_selection_with_what_to_do(server, tiny_dir, rows_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FTRUN_CHOOSER_KEY", "wrong")
    server.replies = [(403, "not you")]
    assert choose(server, tiny_dir, rows_file, tmp_path / "run") == 5
    printed = capsys.readouterr().err
    assert "HTTP 403: not you" in printed and "FTRUN_CHOOSER_KEY" in printed and "Traceback" not in printed
