"""Time and memory of `ftrun select` over pools of ten thousand to a million rows.

Every measurement is a process of its own with an empty cache; "scored" is superfiltering under a random model of one
layer and 500 words, so that what is measured is not the model; the others count tokens by the demo's tokenizer. The first size of a recipe is the baseline of its ratios. Start with
`python scripts/bench_pool.py --json pool.json`; sizes, recipes and threads can be chosen.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES = [10_000, 100_000, 1_000_000]
RECIPES = {
    "random": ["recipe=random"],
    "longest": ["recipe=longest"],
    "scored": ["recipe=superfiltering"],
}
WORDS = 500  # of a made-up language


def made_up_words() -> list[str]:
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(WORDS)]


def make_pool(file: Path, rows: int) -> None:
    """Alpaca rows of about 650 bytes, the same for the same number of rows."""
    draw, words = random.Random(1), made_up_words()
    with file.open("w") as out:
        for _ in range(rows):
            asked, said = (" ".join(draw.choices(words, k=draw.randint(*span))) for span in ((8, 40), (5, 140)))
            out.write(json.dumps({"instruction": asked, "input": "", "output": said}) + "\n")


def make_model(folder: Path) -> None:
    """A random one-layer model that knows the words of the language and no others."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(["<unk>", "<eos>", *made_up_words()]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} <eos> {% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def measure(words: list[str], folder: Path) -> dict[str, Any]:
    """Seconds, peak memory of the process and outcome of one command."""
    environment = os.environ | {"FTRUN_CACHE": str(folder / "cache")}
    started = time.perf_counter()
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "ftrun", "select", *words], stderr=said, stdout=said, env=environment
        )
        _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    code = os.waitstatus_to_exitcode(status)
    if code != 0:
        sys.exit((folder / "said").read_text())
    return {"seconds": seconds, "bytes": used.ru_maxrss * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "RAYON_NUM_THREADS": str(options.threads)}
    from ftrun.runs.lockfile import processor

    print(f"{processor()}, float32, {options.threads} threads")
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_model(folder / "model")
        make_pool(folder / "pool.jsonl", 100)  # the demo's model is converted once, which is not what is measured
        measure(["recipe=random", "budget=10", f"data.path={folder / 'pool.jsonl'}", f"out={folder / 'first'}"], folder)
        for size in options.sizes:
            make_pool(folder / "pool.jsonl", size)
            for name in options.recipes:
                words = [*RECIPES[name], f"data.path={folder / 'pool.jsonl'}", f"out={folder / f'{name}-{size}'}"]
                words += ["budget=0.05", f"launch.threads={options.threads}"]
                words += [f"model.path={folder / 'model'}"] * (name == "scored")
                found = measure(words, folder)
                first = next((line for line in lines if line["recipe"] == name), found)
                line = {"recipe": name, "rows": size, **found, "ratio": found["seconds"] / first["seconds"]}
                lines.append(line)
                print(
                    f"{name:8} {size:>9,} rows {found['seconds']:8.1f} s {found['bytes'] / 1e9:6.2f} GB  "
                    f"{line['ratio']:5.1f}x of {first.get('rows', size):,} rows",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
