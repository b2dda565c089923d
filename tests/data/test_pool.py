"""A pool is a list on disk: ids, content and hashes survive, memory stays small, mixtures and held-out rows are stable."""

from __future__ import annotations

import json
import string
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrun.config.settings import DataConfig
from ftrun.data.pool import Pool, load_pool, mixture_counts, split_heldout, train_and_heldout
from ftrun.errors import ConfigError, DataError


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def alpaca(numbers, word="answer") -> list[dict]:
    return [{"instruction": f"question {n}", "input": "", "output": f"{word} {n}"} for n in numbers]


def pool_of(folder: Path, rows: list[dict], name: str = "rows", **data) -> Pool:
    return load_pool(DataConfig(path=write(folder / f"{name}.jsonl", rows), **data), folder / f"work-{name}", 0)


def contents(pool: Pool) -> list[str]:
    return [record.response for record in pool]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8), st.booleans())
def test_odd_strings_survive(pairs, packed):
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if packed:  # through the spool
            (folder / "rows.json").write_text(json.dumps(rows))
        else:  # in place
            write(folder / "rows.jsonl", rows)
        path = str(folder / ("rows.json" if packed else "rows.jsonl"))
        pool = load_pool(DataConfig(path=path), folder / "work", 0)
        assert [record.id for record in pool] == list(range(len(rows)))
        assert [pool.fields(id) for id in range(len(rows))] == rows
        assert [(record.messages[0].content, record.response) for record in pool] == pairs
        assert (pool.hashes[:, None] == pool.hashes).tolist() == [[a == b for b in rows] for a in rows]


def test_random_access_origin_and_missing_ids(tmp_path):
    pool = pool_of(tmp_path, alpaca(range(10)))
    assert (pool[7].response, pool[7].id, pool.kind, pool.format) == ("answer 7", 7, "sft", "alpaca")
    assert pool.origin(7) == f"{tmp_path / 'rows.jsonl'}:8"
    for missing in (10, -1):
        with pytest.raises(KeyError):
            pool[missing]


def test_subset_keeps_ids(tmp_path):
    pool = pool_of(tmp_path, alpaca(range(10)))
    part = pool.subset([8, 2, 5])
    assert [record.id for record in part] == [8, 2, 5] and contents(part) == ["answer 8", "answer 2", "answer 5"]
    assert part[2].response == "answer 2" and part.origin(5) == pool.origin(5)
    assert part.hashes.tolist() == pool.hashes[[8, 2, 5]].tolist()
    assert part.subset([5]).fingerprint != part.fingerprint != pool.fingerprint
    for missing in (0, 3):
        with pytest.raises(KeyError):
            part[missing]
    with pytest.raises(KeyError):
        part.subset([2, 3])


def test_hash_is_of_the_content_alone(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = alpaca(range(6))
    first = pool_of(tmp_path, rows)
    moved = pool_of(tmp_path, rows[::-1], "moved")
    assert moved.hashes.tolist() == first.hashes[::-1].tolist()
    assert moved.fingerprint != first.fingerprint

    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([row | {"input": None, "id": n} for n, row in enumerate(rows)]),
        tmp_path / "p.parquet",
    )
    parquet = load_pool(DataConfig(path=str(tmp_path / "p.parquet")), tmp_path / "work-parquet", 0)
    chat = [
        {"messages": [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]}
        for row in rows
    ]
    for other in (parquet, pool_of(tmp_path, chat, "chat"), pool_of(tmp_path, rows, "system", system="be kind")):
        assert other.hashes.tolist() == first.hashes.tolist()
    assert pool_of(tmp_path, rows, "again").fingerprint == first.fingerprint
    assert pool_of(tmp_path, [row | {"quality": 1} for row in rows], "more").fingerprint != first.fingerprint


def test_bad_row_names_file_line_and_row_and_leaves_nothing(tmp_path):
    path = write(tmp_path / "rows.jsonl", [*alpaca(range(3)), {"instruction": "q", "output": ""}])
    with pytest.raises(DataError, match=r"row 3 of .*rows.jsonl has an empty output") as caught:
        load_pool(DataConfig(path=path), tmp_path / "work", 0)
    assert caught.value.where == f"{path}:4"
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("packed", [False, True])
def test_unfit_rows_are_left_out_by_name_and_keep_their_numbers(packed, tmp_path):
    rows = alpaca(range(8))
    rows[2]["output"], rows[5] = "", {"instruction": "q", "input": "i"}
    path = write(tmp_path / "rows.jsonl", rows)
    if packed:
        path = str(tmp_path / "rows.json")
        Path(path).write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"row 2 of .* has an empty output") as caught:
        load_pool(DataConfig(path=path), tmp_path / "work", 0)
    assert "data.unfit=drop" in caught.value.todo
    pool = load_pool(DataConfig(path=path, unfit="drop"), tmp_path / "work", 0)
    assert pool.ids.tolist() == [record.id for record in pool] == [0, 1, 3, 4, 6, 7]
    assert contents(pool) == [f"answer {n}" for n in pool.ids] and pool.fields(7) == rows[7]
    with pytest.raises(KeyError):
        pool[2]
    (note,) = pool.notes
    assert note.startswith(f"2 rows of {path} left out (data.unfit=drop): row 2 of ") and "row 5 of" in note
    mixture = DataConfig(path=[path, write(tmp_path / "more.jsonl", alpaca(range(20, 24)))], unfit="drop")
    assert len(load_pool(mixture, tmp_path / "work", 0)) == 10
    nothing = write(tmp_path / "nothing.jsonl", [{"instruction": "q", "output": " "}])
    with pytest.raises(DataError, match="none of the rows can be used"):
        load_pool(DataConfig(path=nothing, unfit="drop"), tmp_path / "work", 0)


def test_folder_with_two_formats_is_refused(tmp_path):
    (tmp_path / "rows").mkdir()
    write(tmp_path / "rows" / "a.jsonl", alpaca(range(3)))
    write(tmp_path / "rows" / "b.jsonl", [{"prompt": "q", "completion": "a"}])
    with pytest.raises(DataError, match="is prompt_completion, but the rows before it are alpaca") as caught:
        load_pool(DataConfig(path=str(tmp_path / "rows")), tmp_path / "work", 0)
    assert caught.value.where.endswith("b.jsonl:1")


def test_pools_that_share_a_folder_do_not_meet(tmp_path):
    """Spooled rows stay those of their own pool, and no file stays behind."""
    pools = []
    for word in ("first", "second"):
        (tmp_path / "rows.json").write_text(json.dumps(alpaca(range(5), word)))
        pools.append(load_pool(DataConfig(path=str(tmp_path / "rows.json")), tmp_path / "work", 0))
    assert [contents(pool)[4] for pool in pools] == ["first 4", "second 4"]
    assert list((tmp_path / "work").iterdir()) == []


def test_limit_takes_the_first_rows(tmp_path):
    assert contents(pool_of(tmp_path, alpaca(range(9)), limit=4)) == contents(
        pool_of(tmp_path, alpaca(range(4)), "four")
    )
    for wrong in (0, -3):
        with pytest.raises(ConfigError, match="limit"):
            pool_of(tmp_path, alpaca(range(9)), limit=wrong)


def test_changed_file_is_refused(tmp_path):
    pool = pool_of(tmp_path, alpaca(range(3)))
    write(tmp_path / "rows.jsonl", alpaca(range(4)))
    with pytest.raises(DataError, match="has changed"):
        pool[0]


def test_memory_stays_small(tmp_path):
    """A jsonl of 60 MB is read, indexed, split and iterated within a tenth of its size."""
    row = json.dumps({"instruction": "q" * 5000, "output": "a" * 5000})
    path = tmp_path / "big.jsonl"
    with path.open("w") as file:
        for number in range(6_000):
            file.write(f'{row[:-1]}, "number": {number}}}\n')
    assert path.stat().st_size > 60e6
    pool_of(tmp_path, alpaca(range(2)), "warm")  # imports and caches are not what is measured
    tracemalloc.start()
    try:
        pool = load_pool(DataConfig(path=str(path)), tmp_path / "work", 0)
        read = sum(len(record.response) for record in pool)
        assert pool.fingerprint and pool.fields(5_999)["number"] == 5_999
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert read == 30_000_000
    assert peak < 6e6


# ---- mixtures ----


def mixture(folder: Path, sizes: dict[str, int], seed=0, **data) -> Pool:
    paths = [write(folder / f"{name}.jsonl", alpaca(range(size), name)) for name, size in sizes.items()]
    return load_pool(DataConfig(path=paths, **data), folder / "work", seed)


def counts(pool: Pool) -> dict[str, int]:
    return dict(Counter(record.response.split()[0] for record in pool))


def test_mixture_without_weights_is_everything_once(tmp_path):
    pool = mixture(tmp_path, {"a": 7, "b": 3})
    assert contents(pool) == [f"a {n}" for n in range(7)] + [f"b {n}" for n in range(3)]
    assert [record.id for record in pool] == list(range(10))
    assert len(pool.notes) == 2 and "7 rows used, 7 there" in pool.notes[0]


def test_mixture_meets_its_weights(tmp_path):
    pool = mixture(tmp_path, {"a": 30, "b": 10}, weights=[1, 3])
    assert counts(pool) == {"a": 10, "b": 30}
    repeats = Counter(record.response for record in pool)
    assert max(count for text, count in repeats.items() if text.startswith("a")) == 1  # thinned, not repeated
    assert {count for text, count in repeats.items() if text.startswith("b")} == {3}
    assert "30 rows used, 10 there, each 3.00 times" in pool.notes[1]
    assert [record.id for record in pool] == list(range(40))


def test_mixture_with_limit_and_seed(tmp_path):
    sizes = {"a": 50, "b": 50}
    first = mixture(tmp_path, sizes, weights=[0.8, 0.2], limit=20)
    assert counts(first) == {"a": 16, "b": 4}
    assert contents(mixture(tmp_path, sizes, weights=[0.8, 0.2], limit=20)) == contents(first)
    assert contents(mixture(tmp_path, sizes, weights=[0.8, 0.2], limit=20, seed=1)) != contents(first)
    assert counts(mixture(tmp_path, sizes, limit=10)) == {"a": 5, "b": 5}
    assert len(mixture(tmp_path, sizes, limit=1000)) == 100


@given(
    st.lists(st.tuples(st.integers(1, 500), st.floats(0, 10)), min_size=1, max_size=6), st.none() | st.integers(1, 2000)
)
def test_mixture_counts_add_up(sources, limit):
    sizes, weights = np.array([size for size, _ in sources]), [weight for _, weight in sources]
    if sum(weights) <= 1e-3:
        weights = [1.0] * len(weights)
    taken = mixture_counts(sizes, weights, limit)
    total = limit or sizes.sum()
    assert taken.sum() == total
    assert np.all(np.abs(taken - np.array(weights) / sum(weights) * total) < 1 + 1e-6)


def test_mixtures_that_cannot_be(tmp_path):
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(ConfigError, match="weights"):
            mixture(tmp_path, {"a": 3, "b": 3}, weights=weights)
    paths = [write(tmp_path / "a.jsonl", alpaca(range(3))), write(tmp_path / "t.jsonl", [{"text": "t"}])]
    with pytest.raises(DataError, match="cannot be trained together"):
        load_pool(DataConfig(path=paths), tmp_path / "work", 0)


def test_mixture_of_two_layouts_of_one_kind(tmp_path):
    paths = [
        write(tmp_path / "a.jsonl", alpaca(range(2))),
        write(tmp_path / "b.jsonl", [{"prompt": "q", "completion": "c"}]),
    ]
    pool = load_pool(DataConfig(path=paths), tmp_path / "work", 0)
    assert pool.format == "alpaca + prompt_completion" and contents(pool) == ["answer 0", "answer 1", "c"]


# ---- held-out rows ----


def test_split_depends_on_content_alone(tmp_path):
    few, many = pool_of(tmp_path, alpaca(range(300))), pool_of(tmp_path, alpaca(range(600))[::-1], "many")
    held_few, held_many = (set(contents(split_heldout(pool, 0.1, 0)[1])) for pool in (few, many))
    assert held_few == held_many & set(contents(few))  # more rows, another order: nobody changes sides
    assert set(contents(split_heldout(few, 0.1, 1)[1])) != held_few
    assert 30 <= len(held_many) <= 90
    assert set(contents(split_heldout(few, 0.1, 0)[1])) <= set(contents(split_heldout(few, 0.3, 0)[1]))


def test_a_small_pool_holds_out_one_row(tmp_path):
    """The one that a larger share would take first; a pool that says one thing only keeps it."""
    few = pool_of(tmp_path, alpaca(range(6)))
    train, held = split_heldout(few, 1e-9, 0)
    assert (len(train), len(held)) == (5, 1)
    shares = [set(contents(split_heldout(few, share, 0)[1])) for share in (0.2, 0.4, 0.6)]
    assert all(set(contents(held)) <= larger for larger in shares)
    same = pool_of(tmp_path, alpaca([1]) * 3, "same")
    assert [len(part) for part in split_heldout(same, 1e-9, 0)] == [3, 0]


def test_equal_rows_never_lie_on_both_sides(tmp_path):
    pool = pool_of(tmp_path, [row | {"id": n} for n, row in enumerate(alpaca(range(100)) * 3)])
    train, held = split_heldout(pool, 0.3, 0)
    assert len(train) + len(held) == 300 and len(held) % 3 == 0 and len(held)
    assert not set(contents(train)) & set(contents(held))
    assert sorted([*train.ids, *held.ids]) == list(range(300))


def test_no_share_and_every_share(tmp_path):
    pool = pool_of(tmp_path, alpaca(range(5)))
    assert [len(part) for part in split_heldout(pool, 0.0, 0)] == [5, 0]
    for wrong in (1.0, -0.1):
        with pytest.raises(ConfigError, match="heldout"):
            split_heldout(pool, wrong, 0)
    with pytest.raises(DataError, match="all were held out"):
        split_heldout(pool, 1 - 1e-12, 0)
    train, held = train_and_heldout(pool_of(tmp_path, alpaca([1]), "one"), DataConfig(heldout=1e-9), tmp_path, 0)
    assert len(held) == 0 and "nothing is held out" in train.notes[-1]


def test_heldout_file_is_kept_out_of_training(tmp_path):
    pool = pool_of(tmp_path, alpaca(range(20)))
    data = DataConfig(
        path=str(tmp_path / "rows.jsonl"),
        heldout_path=write(tmp_path / "held.jsonl", alpaca(range(15, 40))),
        heldout_limit=10,
    )
    train, held = train_and_heldout(pool, data, tmp_path / "work", 0)
    assert contents(train) == [f"answer {n}" for n in range(15)]
    assert len(held) == 10 and set(contents(held)) <= {f"answer {n}" for n in range(15, 40)}
    assert any("5 training rows are also in" in note for note in train.notes)
    assert any("10 of 25 held-out rows" in note for note in train.notes)
    assert contents(train_and_heldout(pool, data, tmp_path / "again", 0)[1]) == contents(held)


def test_builtin_and_folder_as_a_mixture(tmp_path):
    (tmp_path / "rows").mkdir()
    write(tmp_path / "rows" / "a.jsonl", alpaca(range(4)))
    pool = load_pool(
        DataConfig(path=[str(tmp_path / "rows"), "builtin:gsm_symbolic:4"], weights=[1, 1]), tmp_path / "work", 0
    )
    assert len(pool) == 8 and pool[7].verifier == "gsm_symbolic" and pool.origin(4) == "builtin:gsm_symbolic:4:1"
    assert all(character in string.printable for character in pool.fingerprint)
