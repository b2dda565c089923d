"""Prompt and answers, token by token."""

from __future__ import annotations

import json

import pytest

from ftrun.config.settings import DataConfig
from ftrun.data.pool import load_pool
from ftrun.data.prepare import prepare
from ftrun.data.roles import ROLES, with_roles

CHAT = [
    {"role": "system", "content": "the dog"},
    {"role": "user", "content": "what is 1 plus 2"},
    {"role": "assistant", "content": "answers: 3"},
    {"role": "user", "content": "what is 2 plus 2"},
    {"role": "assistant", "content": "answers: 4"},
]


@pytest.mark.parametrize("train_on", ["responses", "all"])
@pytest.mark.parametrize("max_length", [512, 60])
def test_answers_are_what_the_assistant_says(train_on, max_length, tiny_dir, tmp_path):
    """Also where everything is trained, and where a row is cut."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": CHAT[:count]}) + "\n" for count in (3, 5)))
    data = DataConfig(path=str(path), max_length=max_length, overlong="truncate", train_on=train_on)
    pool = load_pool(data, tmp_path / "work", 0)
    made = prepare(pool, tokenizer, data, context_length=512, vocab_size=len(tokenizer), folder=tmp_path / "tokens")
    table = with_roles(made.table, pool, tokenizer, train_on)
    assert table.role is not None
    for row, said in enumerate((["answers: 3"], ["answers: 3", "answers: 4"])):
        ids, role = (values[table.offsets[row] : table.offsets[row + 1]] for values in (table.input_ids, table.role))
        text = tokenizer.decode(ids[role == ROLES.index("answer")])
        whole = "".join(f"{answer}<|im_end|>" for answer in said)
        assert text == (whole if max_length == 512 else whole[: len(text)]) and len(text) > len("answers")
        assert "what" not in text and "dog" in tokenizer.decode(ids[role == ROLES.index("prompt")])
    assert table.rows([1]).role.tolist() == table.role[table.offsets[1] :].tolist()


def test_a_text_has_no_roles(tiny_dir, text_file, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    data = DataConfig(path=str(text_file), max_length=256)
    pool = load_pool(data, tmp_path / "work", 0)
    made = prepare(pool, tokenizer, data, context_length=512, vocab_size=len(tokenizer), folder=tmp_path / "tokens")
    assert with_roles(made.table, pool, tokenizer, "responses").role is None
