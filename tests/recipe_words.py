"""The words with which a recipe runs on the tiny model."""

from __future__ import annotations

import json

from composed import as_shipped

from ftrun.config import recipes

ARGUMENTS = {
    # what fits layers of width 32
    "adapter=adamss": ["adapter.r=20"],
    "adapter=c3a": ["adapter.block_size=8"],
    "adapter=fourierft": ["adapter.n_frequency=50"],
    "adapter=miss": ["adapter.r=8"],
    "adapter=psoft": ["adapter.r=8"],
    "recipe=pissa_sft": ["adapter.r=16"],
    "adapter=road": ["adapter.group_size=8"],
    "adapter=shira": ["adapter.r=2"],
    "adapter=trainable_tokens": ["adapter.token_indices=[5,6]"],
    "adapter=vblora": ["adapter.vector_length=16"],
    "adapter=waveft": ["adapter.n_frequency=50"],
    "tokens=rho1": ["tokens.reference={tiny}"],
    "tokens=cot_with_topic": [
        "data.max_length=256",
        "data.path={exam}",
        "data.columns={{prompt: question, completion: solution}}",
    ],
    "tokens=in_context_tuning": ["tokens.shots=1"],
    "tokens=symbol_tuning": ["tokens.least=1", "tokens.most=1"],
    "tokens=riff_paraphrase": ["tokens.m=2", "tokens.steps=2", "tokens.max_new_tokens=6"],
    "objective=perfect": ["objective.mask_token=lazy"],  # the tiny encoder's tokenizer has no mask token
    "tokens=fait": ["tokens.wrong=instruction"],
    "tokens=pear": ["tokens.behaviour={tiny}"],
    "tokens=token_cleaning": ["tokens.reference={tiny}"],
    "tokens=critical_token_ft": ["model.path={answering}", "data.path={questions}", "tokens.max_new_tokens=12"],
    "select=text_quality": ["select.minimum_lines=1"],
    "select=long_output_min": ['select.patterns=["what is ([0-9]+)"]'],
    "select=trim": ["select.queries=[{queries}]", "select.layers=2"],
    "select=icon": ["select.queries=[{queries}]", "select.assessment=3", "select.classifier_batch_size=4"],
    "picker=add_one_in": [
        "select.picker.answer=letter",
        "select.picker.shown=2",
        "select.picker.options=2",
        "select.picker.row_length=20",
    ],
    "picker=cluster_share": ["select.picker.clusters=2"],  # four tenths of a cluster of two rows are none
    "picker=dac_iter": ["select.picker.max_new_tokens=8"],
    "select=embedding_similarity": ["select.queries=[{queries}]"],
    "select=got_d": ["select.queries=[{queries}]"],
    "select=less": ["select.queries=[{queries}]"],
    "select=rds_plus": ["select.queries=[{queries}]"],
}

ANSWER = "yes no 7 dog the"  # of the model that has learned to answer


def overrides_for(name, rows_for, tiny_dir, tiny_encoder_dir, out) -> list[str]:
    settings = as_shipped(name).settings
    kind = (settings.component("tokens").eats or (settings.component("objective").kind,))[0]
    further = extra(name, tiny_dir)
    words = [
        f"recipe={name}",
        f"model.path={tiny_encoder_dir if settings.task == 'classify' else tiny_dir}",
        *([] if any(word.startswith("data.path=") for word in further) else [f"data.path={rows_for[kind]}"]),
        "data.heldout=0.2",
        "data.max_length=128",
        "train.max_steps=3",
        "train.batch_size=4",
        f"out={out}",
        *further,
    ]
    if (settings.choice("select"), settings.choice("picker")) != ("none", "own"):
        words.append("budget=0.5")
    for evaluator, _knobs in settings.eval:
        if evaluator in ("generation", "token_shift", "borrowed_tokens", "urial"):
            words += [f"eval.{evaluator}.rows=2", f"eval.{evaluator}.max_new_tokens=4"]
        if evaluator == "urial":
            words.append("eval.urial.examples=0")  # the tiny model attends to 512 tokens
    return words


def extra(name, tiny_dir) -> list[str]:
    recipe, slots = recipes.find(name), ("objective", "tokens", "select", "picker", "adapter")
    return [
        word.format(
            tiny=tiny_dir,
            queries=queries_file(tiny_dir),
            exam=exam_file(tiny_dir),
            questions=questions_file(tiny_dir),
            answering=answering_model(tiny_dir) if "{answering}" in word else "",
        )
        for choice, words in ARGUMENTS.items()
        if choice in [f"recipe={name}", *(f"{slot}={recipe.choice(slot)}" for slot in slots)]
        for word in words
    ]


def queries_file(tiny_dir):
    """Three rows that targeted methods look for."""
    file = tiny_dir.with_name("queries.jsonl")
    rows = [{"instruction": f"what is {i} plus 2", "input": "", "output": f"answers: {i + 2}"} for i in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def questions_file(tiny_dir):
    """Questions that all have the same answer."""
    file = tiny_dir.with_name("questions.jsonl")
    rows = [{"instruction": f"what is {i} plus 1", "input": "", "output": ANSWER} for i in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def answering_model(tiny_dir):
    """The tiny model after it has learned to say ANSWER, and to end there."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_dir.with_name("tiny-answering")
    if folder.exists():
        return folder
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_dir), AutoTokenizer.from_pretrained(tiny_dir)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(80):
        turns = [{"role": "user", "content": f"what is {step % 24} plus 1"}, {"role": "assistant", "content": ANSWER}]
        ids = torch.tensor([tokenizer(tokenizer.apply_chat_template(turns, tokenize=False)).input_ids])
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def exam_file(tiny_dir):
    """Exam tasks with options, a solution and a topic."""
    file = tiny_dir.with_name("exam.jsonl")
    rows = [
        {
            "question": f"{i} plus 2",
            "options": ["no", f"{i + 2}"],
            "answer": "B",
            "solution": f"is {i + 2}",
            "topic": "a",
        }
        for i in range(24)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def trains(name: str) -> bool:
    return "train" in recipes.find(name).values.get("stages", ["train"])
