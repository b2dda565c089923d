"""Command lines, recipe files and data files that nobody should write: each is right, or refused in one clear line.

`python scripts/fuzz.py --lines 2000 --files 500 --seed 0` prints a table (tried, valid, refused, wrong) and writes the
wrong ones to `--out`. The suite tries a few of the same generators.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftrun import registry
from ftrun.config.settings import SECTIONS, root_knobs, section_knobs
from ftrun.errors import LONGEST, FtrunError

SECONDS = 30  # for one case
LIBRARY_WORDS = re.compile(r"hydra\.errors|omegaconf\.|antlr|no viable alternative|Traceback|a component failed")


@dataclass(frozen=True)
class Case:
    kind: str
    shown: str
    work: Callable[[], str | None]  # what is wrong with what was accepted
    refusals: tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    kind: str
    shown: str
    result: str  # valid | refused | wrong
    said: str


def judge(case: Case) -> Outcome:
    """Do it and judge how it ended."""
    from ftrun import cli

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    problem: str | None = None
    error: FtrunError | None = None
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            problem = case.work()
    except FtrunError as found:
        error = found
    except Exception as found:
        error = cli.unexpected(found)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    if error is None:
        return Outcome(case.kind, case.shown, "wrong" if problem else "valid", problem or "")
    said = str(error)
    clear = bool(error.what.strip()) and len(said.splitlines()) <= 3 and len(said) < 3 * LONGEST
    fine = error.exit_code in case.refusals and clear and not LIBRARY_WORDS.search(said)
    return Outcome(case.kind, case.shown, "refused" if fine else "wrong", f"{error.exit_code}: {said}")


# ---- command lines and recipe files ----

ODD = ["0", "-1", "null", "true", "", " ", "1e999", "nan", "-inf", "0x1f", "007", "1_000", "9" * 30, "9" * 5000]
ODD += [
    "[]",
    "{}",
    "[a]",
    "{a: 1}",
    "[[1]]",
    "[" * 60,
    "{a: " * 60,
    "'",
    '"a',
    "'a'b",
    "a'b",
    "[a",
    "a]",
    "}",
    "\\",
    "a\\",
]
ODD += ["a,b", ",", "=", "a=b", "é", "🙂", "\u202ex", "\u2028", "\n", "\t", "\0", "\udcff", "`ls`", "$(ls)", "x" * 5000]
ODD += ["${seed}", "${", "${x}", "${data.path}", "${oc.env:NOPE}", "${oc.env:HOME}", "${oc.decode:'['}", "${${seed}}"]
ODD += ["${now:%Y}", "\\${seed}", "${oc.create:{a: 1}}", "choice(", "range(1,3)", "range(a)", "glob(*)", "sort(3,1)"]
ODD += ["~", "~/x", "~nobody/x", "../../x", "/dev/null", "/", "???", "_target_", "{_target_: os.system}", "int(x)"]
ODD += [
    "lora",
    "none",
    "sft",
    "lora+dora",
    "[talr,dft]",
    "[talr,talr]",
    "talr+",
    "lora_sft",
    "builtin:nope:3",
    "on",
    "2020-01-01",
]
PREFIXES = ["", "", "", "", "", "", "", "+", "++", "~", "~", "@", "+ "]
SUFFIXES = ["", "", "", "", "", "", "", "", "@x", ".x", ".0", "/x", "@_global_", "-", "[0]"]
VERBS = ["train", "select", "plan", "preview", "eval", "generate", "merge", "show"]


def _keys() -> list[str]:
    keys = [*root_knobs(), *registry.SLOTS, "hydra.job.name", "hydra/launcher", "_recipe_file", "_block/adapter", "lr"]
    keys += [f"{section}.{name}" for section in SECTIONS for name in section_knobs(section)]
    for slot in registry.SLOTS:
        for spec in registry.specs(slot).values():
            below = {"eval": f"eval.{spec.name}", "picker": "select.picker"}.get(slot, slot)
            keys += [f"{below}.{knob}" for knob in spec.knobs]
    return keys


def config_cases(seed: int, count: int, folder: Path) -> Iterator[Case]:
    """Half command lines, half recipe files with a command line that names them."""
    draw, keys = random.Random(seed), _keys()
    choices = [f"{slot}={name}" for slot in registry.SLOTS for name in registry.specs(slot)]
    from ftrun.config import recipes

    names = sorted(recipes.catalogue())
    for number in range(count):
        words = [draw.choice(VERBS) if draw.random() < 0.5 else "train"]
        if number % 2:
            file = (
                folder
                / f"{draw.choice(['a', 'null', 'inf', '1e5', 'ä b', 'a.b', 'x--y', 'a@b', 'lora_sft'])}{number % 7 or ''}.yaml"
            )
            content = _recipe(draw, keys)
            words.append(f"recipe={file}")
            shown = f"{content[:300]!r}"
        else:
            content, file, shown = b"", None, ""
            words += [f"recipe={draw.choice(names)}"] * (draw.random() < 0.6)
        for _ in range(draw.randint(0 if file else 1, 3)):
            if draw.random() < 0.25:
                words.append(draw.choice(choices))
            else:
                key = draw.choice(PREFIXES) + draw.choice(keys) + draw.choice(SUFFIXES)
                words.append(f"{key}={draw.choice(ODD)}")
        yield Case(
            "recipe file" if file else "command line", f"{words!r} {shown}"[:900], _typed(words, file, content), (2,)
        )


def _typed(words: list[str], file: Path | None, content: bytes) -> Callable[[], None]:
    def work() -> None:
        from ftrun import cli
        from ftrun.config import compose

        if file:
            file.write_bytes(content)
        line = cli.parse(words)
        if line.rest:
            return
        settings = compose.load(line.overrides, line.verb).settings
        json.dumps(settings.as_dict()).encode()

    return work


def _recipe(draw: random.Random, keys: list[str]) -> bytes:
    """A recipe in YAML of some depravity."""
    whole = draw.random()
    if whole < 0.25:
        return draw.choice(WHOLE)
    lines = []
    for _ in range(draw.randint(1, 4)):
        section, _, name = draw.choice(keys).partition(".")
        value = draw.choice(ODD + TAGGED).replace("\n", " ")
        lines.append(
            f"{section}:\n  {name.replace('.', ': {')}: {value}{'}' * name.count('.')}"
            if name
            else f"{section}: {value}"
        )
    if draw.random() < 0.5:
        lines.insert(
            0,
            f"defaults:\n  - override /{draw.choice([*registry.SLOTS, 'model', 'hydra/launcher', '../x'])}: {draw.choice(ODD)[:40]!r}",
        )
    text = "\n".join(lines)
    encoding = draw.choice(["utf-8"] * 9 + ["utf-8-sig", "utf-16", "latin-1"])
    return text.encode(encoding, errors="replace")


TAGGED = [
    "!!python/object/apply:os.system [ls]",
    "!!binary aGk=",
    "!!set {a}",
    "!!timestamp 2020-01-01",
    "!!int x",
    "!!map [a]",
]
TAGGED += [
    "&a [*a]",
    "*nope",
    "{<<: 3}",
    "|\n  text",
    ".nan",
    ".inf",
    "1:30",
    "0o17",
    "{a: 1, a: 2}",
    "{? [a] : 1}",
    "{on: 1}",
]
WHOLE = [
    b"",
    b"\0",
    b"[]",
    b"3",
    b"null",
    b"- a",
    b"a: 1\n---\nb: 2",
    b"\xff\xfe\x00",
    b"seed: 1\r\rseed: 2",
    b"{" * 100_000,
    b"[" * 100_000,
]
WHOLE += [
    b"hydra: {run: {dir: /}}",
    b"out: ../x",
    b"model: {trust_remote_code: true}",
    b"adapter: {_target_: os.system}",
]
WHOLE += [
    b"a: " + b"x" * 1_000_000,
    b"x" * 2_000_000,
    b"\n".join(b"k%d: 1" % at for at in range(50_000)),
    b"- " * 5000 + b"a",
]
WHOLE += [
    b"data: &a\n  columns: *a",
    b"a: &a [x,x]\n"
    + b"".join(
        b"b%d: &b%d [%s]\n" % (at, at, b",".join([b"*%s" % (b"b%d" % (at - 1) if at else b"a")] * 9)) for at in range(9)
    ),
]


# ---- data files ----

TEXTS = ["q", "a\u2028b", "é🙂", "\u202eabc\u202c", "line\nbreak\r\n", 'quo"te', "tab\t;,", "שלום", "x\x85y", "a" * 300]


def rows_of(draw: random.Random, count: int) -> list[dict[str, Any]]:
    return [{"prompt": draw.choice(TEXTS) + str(at), "completion": draw.choice(TEXTS)} for at in range(count)]


def data_cases(seed: int, count: int, folder: Path) -> Iterator[Case]:
    """Good rows in odd clothes, which must arrive; and damaged ones, which must arrive or be refused with their place."""
    draw = random.Random(seed)
    for number in range(count):
        rows = rows_of(draw, draw.randint(1, 5))
        place = folder / str(number)
        place.mkdir(parents=True)
        name, content, same = draw.choice(DRESSES)(draw, rows)
        kind = "data in odd clothes" if same else "damaged data"
        yield Case(kind, f"{name} {content[:200]!r}", _read(place, name, content, rows if same else None), (2, 3))


def _read(folder: Path, name: str, content: bytes, rows: list[dict[str, Any]] | None) -> Callable[[], str | None]:
    def work() -> str | None:
        from ftrun.config.settings import DataConfig
        from ftrun.data.pool import load_pool

        file = folder / name
        file.write_bytes(content)
        try:
            pool = load_pool(DataConfig(path=str(file)), folder / "work", 0)
        except FtrunError as error:
            if rows is not None:
                return f"good rows are refused: {error}"
            if str(file) not in str(error):
                return f"the file is not named: {error}"
            raise
        found = [pool.fields(id) for id in pool.ids.tolist()]
        json.dumps(found, ensure_ascii=False).encode()
        return f"other rows: {found!r:.300}" if rows is not None and found != rows else None

    return work


Dressed = tuple[str, bytes, bool]


def _jsonl(rows: list[dict[str, Any]], escaped: bool = False, end: str = "\n") -> str:
    return "".join(json.dumps(row, ensure_ascii=escaped) + end for row in rows)


def _clean(draw: random.Random, rows: list[dict[str, Any]]) -> Dressed:
    text = _jsonl(rows, draw.random() < 0.5, draw.choice(["\n", "\r\n", "\n\n", " \n"]))
    text = draw.choice(["", "\ufeff", "\n"]) + (text if draw.random() < 0.7 else text.rstrip())
    return (
        ("a.jsonl.gz", gzip.compress(text.encode()), True) if draw.random() < 0.3 else ("a.jsonl", text.encode(), True)
    )


def _clean_json(draw: random.Random, rows: list[dict[str, Any]]) -> Dressed:
    text = json.dumps({"data": rows} if draw.random() < 0.5 else rows, indent=draw.choice([None, 1]))
    return (
        draw.choice(["a.json", "ä b.json", "[x].json"]),
        text.encode("utf-8-sig" if draw.random() < 0.3 else "utf-8"),
        True,
    )


def _clean_csv(draw: random.Random, rows: list[dict[str, Any]]) -> Dressed:
    import csv

    out = io.StringIO()
    mark = draw.choice(",;\t")
    writer = csv.writer(out, delimiter=mark, lineterminator=draw.choice(["\n", "\r\n"]), quoting=csv.QUOTE_ALL)
    writer.writerows([["prompt", "completion"], *([row["prompt"], row["completion"]] for row in rows)])
    return "a.csv", out.getvalue().encode(), True


def _encoded(draw: random.Random, rows: list[dict[str, Any]]) -> Dressed:
    encoding = draw.choice(["utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "utf-7"])
    return draw.choice(["a.jsonl", "a.json", "a.csv"]), _jsonl(rows).encode(encoding, errors="replace"), False


def _cut(draw: random.Random, rows: list[dict[str, Any]]) -> Dressed:
    content = gzip.compress(_jsonl(rows * 20).encode())
    name, whole = draw.choice(
        [
            ("a.jsonl.gz", content),
            ("a.jsonl", _jsonl(rows).encode()),
            ("a.parquet", _parquet(rows)),
            ("a.jsonl.zst", b"(\xb5/\xfd" + content),
        ]
    )
    return name, whole[: draw.randint(0, len(whole) - 1)], False


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


def _clean_parquet(draw: random.Random, rows: list[dict[str, Any]]) -> Dressed:
    return "a.parquet", _parquet(rows), True


PIECES = [
    b"",
    b"\0",
    b"\xff",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b"\n",
    b"\r",
    b"\\",
    b"\\ud83d",
    b"\xef\xbb\xbf",
    b"\xe2\x80\xae",
]
PIECES += [
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"null",
    b"9" * 5000,
    b"[" * 3000,
    b'{"a":' * 900,
    b'"prompt":',
    b"'",
    b";",
    b"\t",
]


def _bitten(draw: random.Random, rows: list[dict[str, Any]]) -> Dressed:
    name, whole, _ = draw.choice([_clean, _clean_json, _clean_csv, _clean_parquet])(draw, rows)
    content = bytearray(whole)
    for _ in range(draw.randint(1, 3)):
        at = draw.randint(0, len(content))
        content[at : at + draw.randint(0, 3)] = draw.choice(PIECES)
    return name, bytes(content), False


VALUES = [
    None,
    True,
    3,
    1e400,
    float("nan"),
    "",
    " ",
    [],
    {},
    [1],
    {"a": 1},
    [[]],
    [{}],
    [{"role": "user"}],
    10**400,
    "\ud83d",
    "\0",
]


def _typed_wrong(draw: random.Random, rows: list[dict[str, Any]]) -> Dressed:
    spoilt = [dict(row) for row in rows]
    spoilt[-1][
        draw.choice(
            ["prompt", "completion", "messages", "tools", "weight", "label", "chosen", "system", "source", "history"]
        )
    ] = draw.choice(VALUES)
    return draw.choice(["a.jsonl", "a.json"]), _jsonl(spoilt, True).encode(), False


DRESSES = [
    _clean,
    _clean_json,
    _clean_csv,
    _clean_parquet,
    _encoded,
    _cut,
    _bitten,
    _bitten,
    _bitten,
    _typed_wrong,
    _typed_wrong,
]


def campaign(lines: int, files: int, seed: int) -> list[Outcome]:
    """All cases of these counts, one after the other."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = [*config_cases(seed, lines, folder), *data_cases(seed, files, folder / "data")]
        found = []
        for number, case in enumerate(cases, start=1):
            found.append(judge(case))
            if number % 100 == 0 and sys.stderr.isatty():
                print(f"\r{number} of {len(cases)}", end="", file=sys.stderr)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=2000, help="command lines and recipe files")
    parser.add_argument("--files", type=int, default=500, help="data files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzz-wrong.jsonl"), help="where the wrong ones are written")
    options = parser.parse_args()
    began = time.monotonic()
    found = campaign(options.lines, options.files, options.seed)
    counts = Counter((one.kind, one.result) for one in found)
    print(f"{'kind':<20} {'tried':>7} {'valid':>7} {'refused':>8} {'wrong':>6}")
    for kind in dict.fromkeys(one.kind for one in found):
        valid, refused, wrong = (counts[kind, result] for result in ("valid", "refused", "wrong"))
        print(f"{kind:<20} {valid + refused + wrong:>7} {valid:>7} {refused:>8} {wrong:>6}")
    print(f"{time.monotonic() - began:.0f} s, seed {options.seed}")
    wrong = [vars(one) for one in found if one.result == "wrong"]
    if wrong:
        options.out.write_text("".join(json.dumps(one) + "\n" for one in wrong))
        sys.exit(f"{len(wrong)} wrong: {options.out}")


if __name__ == "__main__":
    main()
