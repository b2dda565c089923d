"""Every source gives the same rows with their origin, and every broken one is refused in one line."""

from __future__ import annotations

import csv
import gzip
import json
import socket
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrun.config.settings import DataConfig
from ftrun.data import hub, sources
from ftrun.data.builtin import names
from ftrun.data.pool import load_pool, refuse_idle_split, train_and_heldout
from ftrun.data.raw import Reading
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


def refused(path, *words, reading=None):
    with pytest.raises(DataError) as caught:
        list(sources.read(str(path), reading))
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
        ("a.csv", b"text,label\na,b\na,\0\n", 3),
        ("a.csv", b'text,label\na,b\na,"b\nc,d\n', 3),
        ("a.csv", b'text,label\n"a"b,c\n', 2),
        ("a.csv", b"text;label,other\na;b,c\n", 1),
        ("a.tsv", b"text\tlabel\na\n", 2),
        ("a.csv", "text,label\n".encode("utf-16"), 1),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\0"}\n', 2),
        ("a.jsonl", b'{"text": "a"}\n{"text": "a", "text": "b"}\n', 2),
        ("a.jsonl", b'{"text": "a"}\n{"text": "a", "meta": {"k": 1, "k": 2}}\n', 2),
        ("a.json", b'[\n{"text": "a"},\n{"text": "a", "meta": [{"k": 1, "k": 2}]}\n]', 3),
        ("a.jsonl", b'{"text": "\\ud83d\\ude00"}\n{"text": "a", "meta": "\\ud83d"}\n', 2),
        ("a.json", b'[{"text": "a"}, {"text": "\\udc00"}]', 2),
        ("a.jsonl", b'[{"text": "a"},\n7]', 2),
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


def test_columns_that_are_not_text_are_left_out_by_name(tmp_path):
    """Bytes and images do not matter where no layout reads them, and other kinds become text."""
    import datetime

    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table(
        {
            "text": ["a", "b"],
            "image": pyarrow.array([{"bytes": b"\0", "path": "x"}] * 2),
            "blobs": pyarrow.array([[b"\0"], None]),
            "when": [datetime.timedelta(seconds=1), None],
            "pairs": pyarrow.array([[("k", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
            "word": pyarrow.array(["x", "y"]).dictionary_encode(),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    reading = Reading()
    first, second = sources.read(str(tmp_path / "a.parquet"), reading)
    assert first.fields == {"text": "a", "when": "0:00:01", "pairs": [["k", 1]], "word": "x"}
    assert second.fields["when"] is None and "columns image, blobs hold bytes" in reading.notes[0]
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"a"], "n": [1]}), tmp_path / "b.parquet")
    refused(tmp_path / "b.parquet", "column text", "bytes")
    pyarrow.parquet.write_table(pyarrow.table({"body": [b"a"], "n": [1]}), tmp_path / "c.parquet")
    refused(tmp_path / "c.parquet", "column body", reading=Reading(columns={"text": "body"}))


TABLES = [
    ("a.csv", "\ufeffinstruction;output\n2+2;4\n3, 2;5\n"),
    ("a.csv", "instruction\toutput\n2+2\t4\n3, 2\t5\n"),
    ("a.tsv", "instruction\toutput\r\n2+2\t4\r\n\r\n3, 2\t5"),
    ("a.csv", 'instruction, output\n2+2, 4\n"3, 2", 5\n'),
    ("a.csv", '"instruction";"output"\n"2+2";4\n3, 2;"5"\n'),
    ("a.csv", "sep=;\ninstruction;output\n2+2;4\n3, 2;5\n"),
    ("a.jsonl", '[{"instruction": "2+2", "output": "4"},\n {"instruction": "3, 2", "output": "5"}]'),
    ("a.jsonl", '\ufeff[\n{"instruction": "2+2", "output": "4"}, {"instruction": "3, 2", "output": "5"}\n]\n'),
    (
        "a.json",
        '{"train": [{"instruction": "2+2", "output": "4"}, {"instruction": "3, 2", "output": "5"}], "test": [{}]}',
    ),
    ("a.json", '{"instruction": "2+2", "output": "4"}\n{"instruction": "3, 2", "output": "5"}\n'),
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "content"), TABLES)
def test_usual_ways_to_write_a_table(name, content, packed, tmp_path):
    file = tmp_path / (name + ".gz" * packed)
    file.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    found = [raw.fields for raw in sources.read(str(file))]
    assert found == [{"instruction": "2+2", "output": "4"}, {"instruction": "3, 2", "output": "5"}]


def test_lists_in_cells(tmp_path):
    """What a data frame writes for a list, as JSON or as Python, in columns that hold one; other cells stay text."""
    turns = [{"role": "user", "content": 'Hi, "you"'}, {"role": "assistant", "content": "[1]"}]
    cells = [json.dumps(turns), repr(turns), "[not a list", ""]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["chat", "prompt", "tools", "note"], *([cell, cell, cell, cell] for cell in cells)])
    reading = Reading(columns={"messages": "chat"})
    rows = [raw.fields for raw in sources.read(str(tmp_path / "a.csv"), reading)]
    for column in ("chat", "prompt", "tools"):
        assert [row[column] for row in rows] == [turns, turns, *cells[2:]]
    assert [row["note"] for row in rows] == cells
    (tmp_path / "b.csv").write_text('prompt,completion\n"[1, 2]","[3]"\n')
    assert next(sources.read(str(tmp_path / "b.csv"))).fields == {"prompt": "[1, 2]", "completion": "[3]"}


# ---- splits ----


def part(folder, name, *words):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": list(words)}), file)
    else:
        file.write_text(jsonl({"text": word} for word in words))


CONFIGS = """---
license: mit
configs:
- config_name: default
  data_files:
  - {split: train, path: "data/a-*.jsonl"}
  - {split: test, path: [data/b.jsonl]}
---
# Rows
"""
LAYOUTS = {
    "names": ["train.jsonl", "test.jsonl"],
    "words": ["my_rows-train.jsonl", "my_rows-test.v2.jsonl"],
    "shards": ["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"],
    "data": ["data/train-0.jsonl", "data/test-0.jsonl"],
    "folders": ["train/rows.jsonl", "test/rows.jsonl"],
    "readme": ["data/a-train.jsonl", "data/b.jsonl"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_with_splits(layout, tmp_path):
    for name, words in zip(LAYOUTS[layout], (["a", "b"], ["c"]), strict=True):
        part(tmp_path, name, *words)
    (tmp_path / "README.md").write_text(CONFIGS if layout == "readme" else "---\nlicense: mit\n---\n")
    (tmp_path / "dataset_infos.json").write_text('{"description": "x"}')
    (tmp_path / ".gitattributes").write_text("*.parquet filter=lfs")
    part(tmp_path, ".cache/train.jsonl", "hidden")
    assert texts(tmp_path) == ["a", "b"]
    reading = Reading("test")
    assert texts(tmp_path, reading) == ["c"]
    assert reading.splits and "the split test is read" in reading.notes[0]
    error = refused(tmp_path, 'no split "validation"', "train", "test", reading=Reading("validation"))
    assert error.where == "data.split=validation"


def texts(path, reading=None):
    return [raw.fields["text"] for raw in sources.read(str(path), reading)]


def test_names_of_a_split(tmp_path):
    part(tmp_path, "train.jsonl", "a")
    part(tmp_path, "dev.jsonl", "b")
    for asked in ("dev", "validation", "val"):
        assert texts(tmp_path, Reading(asked)) == ["b"]
    part(tmp_path, "validation.jsonl", "c")
    assert (texts(tmp_path, Reading("dev")), texts(tmp_path, Reading("validation"))) == (["b"], ["c"])
    refused(tmp_path, "more than one", reading=Reading("val"))
    part(tmp_path, "more.jsonl", "d")
    refused(tmp_path, "and files of none", "more.jsonl")
    assert texts(tmp_path / "*.jsonl") == ["b", "d", "a", "c"]  # named one by one


def test_shards_of_one_data_set_are_no_splits(tmp_path):
    part(tmp_path, "part-00000-of-00002.jsonl", "a")
    part(tmp_path, "part-00001-of-00002.jsonl", "b")
    reading = Reading("test")
    assert texts(tmp_path, reading) == ["a", "b"] and not reading.splits
    part(tmp_path, "other-00000-of-00001.jsonl", "c")
    refused(tmp_path, 'no split "train"', "other", "part")
    assert texts(tmp_path, Reading("other")) == ["c"]


@pytest.mark.parametrize(
    ("configs", "words"),
    [
        ("- {config_name: a, data_files: train.jsonl}\n- {config_name: b, data_files: train.jsonl}", ["a, b"]),
        ("- {config_name: a, data_files: ../train.jsonl}", ["outside"]),
        ("- {config_name: a, data_files: nothing.jsonl}", ["no data file", "nothing.jsonl"]),
        ("- {config_name: a, data_files: [{path: 1}]}", ["data_files"]),
        ("- {config_name: [", ["cannot be read"]),
    ],
)
def test_readmes_that_cannot_be_followed(configs, words, tmp_path):
    part(tmp_path, "train.jsonl", "a")
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")
    refused(tmp_path, "README.md", *words)


def test_the_default_config_of_several(tmp_path):
    part(tmp_path, "a.jsonl", "a")
    part(tmp_path, "b.jsonl", "b")
    configs = "- {config_name: a, data_files: a.jsonl}\n- {config_name: b, default: true, data_files: {train: b.jsonl}}"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")
    assert texts(tmp_path) == ["b"]


def test_arrow_splits(tmp_path):
    import datasets

    one, two = (datasets.Dataset.from_list([{"text": word, "image": word.encode()}]) for word in "ab")
    datasets.DatasetDict({"train": one, "test": two}).save_to_disk(tmp_path / "both")
    one.save_to_disk(tmp_path / "each" / "train")
    two.save_to_disk(tmp_path / "each" / "test")
    for folder in ("both", "each"):
        assert texts(tmp_path / folder) == ["a"]
        assert texts(tmp_path / folder, Reading("test")) == ["b"]
        refused(tmp_path / folder, 'no split "dev"', "train", "test", reading=Reading("dev"))
    (tmp_path / "each" / "train" / "data-00000-of-00001.arrow").write_bytes(b"no")
    refused(tmp_path / "each", "train")


def test_a_split_that_chooses_nothing_is_refused(tmp_path):
    part(tmp_path, "rows/a.jsonl", "a")
    part(tmp_path, "splits/test.jsonl", "b")

    def check(split, *paths):
        data = DataConfig(path=[str(tmp_path / path) for path in paths], split=split)
        pool = load_pool(data, tmp_path / "work", 0)
        refuse_idle_split(pool, data)
        return sorted(record.text for record in pool)

    assert check("train", "rows") == check("train", "rows/a.jsonl") == ["a"]
    assert check("test", "splits", "rows") == ["a", "b"]  # it acts on one of them
    for path in ("rows", "rows/a.jsonl", "rows/*"):
        with pytest.raises(DataError, match=r"data\.split=test chooses nothing"):
            check("test", path)


def test_json_with_splits(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"train": [{"text": "a"}], "validation": [{"text": "b"}]}))
    assert texts(tmp_path / "a.json", Reading("dev")) == ["b"]
    refused(tmp_path / "a.json", 'no split "test"', "validation", reading=Reading("test"))


@pytest.mark.parametrize("path", ["", "a\0b.jsonl", "x" * 300 + ".jsonl", "~nobody-of-that-name/a.jsonl", "***/a["])
def test_paths_that_no_file_has(path):
    refused(path)


def test_paths_in_a_home_with_other_letters(tmp_path, monkeypatch):
    home = tmp_path / "jos\u00e9 \u6570\u636e"
    part(home, "r\u00e9sum\u00e9s/train.jsonl", "a")
    monkeypatch.setenv("HOME", str(home))
    for path in ("~/r\u00e9sum\u00e9s/train.jsonl", "~/r\u00e9sum\u00e9s", "~/*/train.jsonl", "~/r\u00e9sum\u00e9s/*"):
        assert texts(path) == ["a"]


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


# ---- damaged files ----

WHOLE = {
    ".jsonl": jsonl([{"prompt": "q \U0001f642", "completion": "a"}, {"prompt": "q", "completion": [1], "n": None}]),
    ".json": json.dumps({"data": [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant"}]}]}),
    ".csv": 'prompt;completion;tools\nq;"a ""b""\nc";"[{""name"": 1}]"\n',
    ".tsv": "text\tlabel\nt\t1\n",
}
DAMAGE = [b"", b"\0", b"\xff", b'"', b"{", b"}", b"[", b"]", b",", b"\n", b"\r", b"\\", b"\\ud83d", b"\xef\xbb\xbf"]
DAMAGE += [
    b"\xe2\x80\xae",
    b"\t",
    b";",
    b"'",
    b"NaN",
    b"-1e999",
    b"null",
    b"[" * 3000,
    b'{"a":' * 900,
    b'"text":',
    b"9" * 5000,
]


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(sorted(WHOLE)),
    st.lists(st.tuples(st.integers(0, 120), st.integers(0, 3), st.sampled_from(DAMAGE)), min_size=1, max_size=3),
)
def test_damaged_files_are_read_or_refused(suffix, damages):
    """Whatever a file holds: rows that can be written down as text, or one line that says what is wrong."""
    content = bytearray(WHOLE[suffix].encode())
    for start, length, piece in damages:
        content[start : start + length] = piece
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / f"a{suffix}"
        file.write_bytes(content)
        try:
            pool = load_pool(DataConfig(path=str(file)), Path(name) / "work", 0)
        except (DataError, ConfigError) as error:
            assert "\n" not in error.what and "\0" not in error.what
            error.what.encode()
        else:
            assert len(list(pool)) == len(pool)
            for id in pool.ids.tolist():
                json.dumps(pool.fields(id), ensure_ascii=False).encode()
