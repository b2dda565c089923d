"""Every source gives the same rows with their origin, and every broken one is refused in one line."""

from __future__ import annotations

import csv
import gzip
import json
import socket

import pytest

from ftrun.config.settings import DataConfig
from ftrun.data import hub, sources
from ftrun.data.builtin import names
from ftrun.data.pool import load_pool, train_and_heldout
from ftrun.data.verify import verifier
from ftrun.errors import ConfigError, DataError

ROWS = [
    {"prompt": 'a, "quoted" b', "completion": "line\nbreak"},
    {"prompt": "separator \u2028 and \x85", "completion": "ünïcödé 🙂"},
    {"prompt": "third", "completion": "3"},
]


def jsonl(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_json(folder):
    (folder / "rows.json").write_text(json.dumps(ROWS, indent=1))
    return "rows.json"


def write_json_data(folder):
    (folder / "rows.json").write_text(json.dumps({"data": ROWS}))
    return "rows.json"


def write_json_lines_under_the_wrong_name(folder):
    (folder / "rows.json").write_text(jsonl(ROWS))
    return "rows.json"


def write_jsonl(folder):
    (folder / "rows.jsonl").write_text(jsonl(ROWS))
    return "rows.jsonl"


def write_jsonl_with_bom_and_blank_lines(folder):
    (folder / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(ROWS).replace("}\n", "}\r\n\r\n").encode())
    return "rows.jsonl"


def write_csv(folder):
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    return "rows.csv"


def write_parquet(folder):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")
    return "rows.parquet"


def write_arrow(folder):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "rows")
    return "rows"


def write_arrow_splits(folder):
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(folder / "rows")
    return "rows"


def write_gz(folder):
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS).encode()))
    return "rows.jsonl.gz"


def write_zst(folder):
    import pyarrow

    write_csv(folder)
    with pyarrow.output_stream(str(folder / "rows.csv.zst"), compression="zstd") as file:
        file.write((folder / "rows.csv").read_bytes())
    return "rows.csv.zst"


def write_folder(folder):
    (folder / "part" / "deep").mkdir(parents=True)
    (folder / "part" / "a.jsonl").write_text(jsonl(ROWS[:1]))
    (folder / "part" / "deep" / "b.json").write_text(json.dumps(ROWS[1:]))
    (folder / "part" / "README.md").write_text("not rows")
    return "part"


def write_glob(folder):
    for number, row in enumerate(ROWS):
        (folder / f"part-{number}.jsonl").write_text(jsonl([row]))
    return "part-*.jsonl"


WRITERS = [value for name, value in list(globals().items()) if name.startswith("write_")]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__[6:])
def test_every_source_gives_the_rows_in_order(write, tmp_path, monkeypatch):
    path = write(tmp_path)
    assert [raw.fields for raw in sources.read(str(tmp_path / path))] == ROWS
    monkeypatch.chdir(tmp_path)
    assert [raw.fields for raw in sources.read(path)] == ROWS


def test_origin_is_file_and_line(tmp_path):
    write_jsonl_with_bom_and_blank_lines(tmp_path)
    assert [(raw.file, raw.line) for raw in sources.read(str(tmp_path / "rows.jsonl"))] == [
        (str(tmp_path / "rows.jsonl"), n) for n in (1, 3, 5)
    ]
    write_csv(tmp_path)
    assert [raw.line for raw in sources.read(str(tmp_path / "rows.csv"))] == [
        2,
        4,
        5,
    ]  # the first row's answer has two lines


def refused(path, *words):
    with pytest.raises(DataError) as caught:
        list(sources.read(str(path)))
    message = str(caught.value)
    assert "\n" not in caught.value.what
    for word in words:
        assert word in message
    return caught.value


def test_missing_file_offers_the_nearest(tmp_path):
    write_jsonl(tmp_path)
    refused(tmp_path / "row.jsonl", "row.jsonl", 'Did you mean "rows.jsonl"?')
    refused(tmp_path / "nowhere" / "rows.jsonl", "nowhere")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_file(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    refused(tmp_path / name, "no rows", name)


def test_header_without_rows(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\n")
    refused(tmp_path / "a.csv", "no rows")


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', 3),
        ("a.json", b'[\n{"text": "a"},\n{"text": oops}\n]', 3),
        ("a.jsonl", b'{"text": "a"}\n["a"]\n', 2),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', 2),
        ("a.jsonl", b"[" * 100_000 + b"\n", 1),
        ("a.csv", b"text,label\na,b\na,b,c\n", 3),
        ("a.csv", b"text,label\n\xffa,b\n", 2),
    ],
)
def test_broken_files_name_the_line(tmp_path, name, content, line):
    (tmp_path / name).write_bytes(content)
    assert refused(tmp_path / name, f"{name}:{line}").exit_code == 3


def test_other_broken_files(tmp_path):
    (tmp_path / "a.json").write_text('{\n"rows": []}')
    refused(tmp_path / "a.json", "neither a list")
    (tmp_path / "a.csv").write_text("text,text\n1,2\n")
    refused(tmp_path / "a.csv", "one name")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    refused(tmp_path / "a.parquet", "parquet")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS * 50).encode())[:-30])
    refused(tmp_path / "a.jsonl.gz", "a.jsonl.gz")
    (tmp_path / "a.txt").write_text("hello")
    refused(tmp_path / "a.txt", ".jsonl")
    (tmp_path / "none").mkdir()
    refused(tmp_path / "none", "no data file")
    refused(tmp_path / "*.nothing", "matches")


def test_bytes_in_parquet_are_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "image": [b"\0"]}), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "bytes")


def test_hub_id_without_a_network_fails_at_once(monkeypatch):
    def no_import(*_):
        raise AssertionError("the hub's client was called")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    refused("someone/some-rows", "HF_HUB_OFFLINE")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(socket, "create_connection", lambda *_: (_ for _ in ()).throw(OSError("no route")))
    refused("someone/some-rows", "does not answer")


def test_failing_hub_is_one_line(monkeypatch):
    import datasets

    def fail(*_, **__):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "_answers", lambda *_: True)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert "second" not in str(refused("someone/some-rows:main", "first line"))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: datasets.Dataset.from_list(ROWS))
    assert [raw.fields for raw in sources.read("someone/some-rows")] == ROWS


# ---- built-in sources ----


def test_builtin_names_come_from_disk():
    assert {"gsm_symbolic", "demo_chat"} <= set(names())
    with pytest.raises(ConfigError, match="gsm_simbolic") as caught:
        list(sources.read("builtin:gsm_simbolic"))
    assert "gsm_symbolic" in caught.value.todo
    for wrong in ("builtin:gsm_symbolic:x", "builtin:gsm_symbolic:0", "builtin:gsm_symbolic:1:2"):
        with pytest.raises(ConfigError):
            list(sources.read(wrong))


def test_gsm_symbolic_rows_pass_their_own_verifier():
    rows = [raw.fields for raw in sources.read("builtin:gsm_symbolic:60")]
    assert len(rows) == 60
    assert rows[:5] == [raw.fields for raw in sources.read("builtin:gsm_symbolic:5")]
    verify = verifier("gsm_symbolic")
    for row in rows:
        assert row["output"].endswith(f"\nThe answer is {row['answer']}.") and "####" not in row["output"]
        assert verify(row["output"], row) == 1.0
        assert verify(row["output"] + " No, the answer is 987654321.", row) == 0.0


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("3 + 4 = 7", "7", 1.0),
        ("7 apples, then 8", "7", 0.0),
        ("The answer is $1,234.00. Good luck with 5!", "1234", 1.0),
        ("#### -5", "-5", 1.0),
        ("#### -5", "5", 0.0),
        ("no idea", "5", 0.0),
        ("", "5", 0.0),
    ],
)
def test_verifier_reads_the_final_number(text, answer, right):
    assert verifier("gsm_symbolic")(text, {"answer": answer}) == right


SUMS = "builtin:reasoning_gym/chain_sum?max_terms=2&max_digits=2"


def test_reasoning_gym_rows_differ_and_pass_their_own_verifier():
    rows = [raw.fields for raw in sources.read(f"{SUMS}:300")]
    assert len({row["instruction"] for row in rows}) == len(rows) == 300
    assert rows[:40] == [raw.fields for raw in sources.read(f"{SUMS}:40")]
    assert all(len(row["instruction"].split(": ")[1].split()) == 4 for row in rows)  # two terms, as the knob says
    verify = verifier("reasoning_gym")
    for row in rows[:40]:
        answer = row["answer"]
        for said in (answer, f" {answer}\n", f"The answer is {answer}.", f"I add them.\n1 + 1 = **{answer}**"):
            assert verify(said, row) == 1.0, said
        for said in ("", f"{answer}7", f"{answer} or {answer}", f"The answer is {int(answer) + 1}.", "no idea"):
            assert verify(said, row) == 0.0, said
    with pytest.raises(DataError, match="another problem"):
        verify("1", rows[0] | {"index": 1})


def test_no_question_of_a_family_with_few_is_on_both_sides(tmp_path):
    """Two sums of one digit: many draws are the same question."""
    data = DataConfig(path="builtin:reasoning_gym/chain_sum?max_terms=2&max_digits=1:100", heldout=0.3)
    train, held = train_and_heldout(load_pool(data, tmp_path, 0), data, tmp_path, 0)
    asked = [{pool[int(id)].messages[0].content for id in pool.ids} for pool in (train, held)]
    assert min(map(len, asked)) > 15 and sum(map(len, asked)) == 100 and not asked[0] & asked[1]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("reasoning_gym", "several problems"),
        ("reasoning_gym/chain_sums", "no family"),
        ("reasoning_gym/chain_sum?max_term=2", "no knob"),
        ("reasoning_gym/chain_sum?max_terms=two", "not of type int"),
        ("reasoning_gym/chain_sum?max_terms=0", "refuses these knobs"),
        ("reasoning_gym/chain_sum?max_terms=2&max_digits=1:5000", "different problems"),
        ("reasoning_gym/family_relationships:4", "not always true"),
        ("demo_chat/some", "one kind of rows"),
    ],
)
def test_problems_that_reasoning_gym_does_not_have(path, said):
    with pytest.raises(ConfigError, match=said):
        list(sources.read(f"builtin:{path}"))


def test_demo_chat_rows_are_whole_and_different():
    rows = [raw.fields for raw in sources.read("builtin:demo_chat")]
    assert len(rows) >= 250
    assert all(set(row) == {"instruction", "input", "output", "source"} and row["source"] == "ftrun" for row in rows)
    assert all(row["instruction"].strip() and row["output"].strip() == row["output"] != "" for row in rows)
    assert len({(row["instruction"], row["input"]) for row in rows}) == len(rows)
    words = sorted(len(row["output"].split()) for row in rows)
    assert words[0] == 1 and words[-1] >= 150 and words[len(words) // 2] >= 10
    with pytest.raises(ConfigError, match="were asked for"):
        list(sources.read("builtin:demo_chat:100000"))


def test_only_checked_sources_have_a_verifier():
    with pytest.raises(ConfigError, match="cannot check"):
        verifier("demo_chat")
