"""Time and memory of `ftrun select` and of `ftrun train` over pools of ten thousand to five million rows.

Every measurement is a process of its own with an empty cache; "scored" is superfiltering under a random model of one
layer and 500 words, so that what is measured is not the model; "train" trains it for three steps of one epoch, so that only reading, checking and tokenising count; the others count
tokens by the demo's tokenizer. Memory is what the process holds for itself; pages of files that it has mapped come on
top, and the system takes them back when it needs them: ``resident`` counts those too. Start with
`python scripts/bench_pool.py --json pool.json`; sizes, recipes and threads can be chosen.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES = [10_000, 100_000, 1_000_000, 5_000_000]
RECIPES = {
    "random": ["select", "recipe=random", "budget=0.05"],
    "longest": ["select", "recipe=longest", "budget=0.05"],
    "scored": ["select", "recipe=superfiltering", "budget=0.05"],
    "train": ["train", "recipe=lora_sft", "adapter.r=2", "train.max_steps=3", "data.heldout=0.01", "eval=[heldout]"],
}
OWN_MODEL = ("scored", "train")  # these use the made-up one
AT_MOST = 12  # times the seconds for ten times the rows
WORDS = 500  # of a made-up language


def made_up_words() -> list[str]:
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(WORDS)]


def make_pool(file: Path, rows: int) -> None:
    """Alpaca rows of about 650 bytes, no two the same; a larger pool begins with the rows of a smaller one."""
    draw, words = random.Random(1), made_up_words()
    with file.open("w") as out:
        for number in range(rows):
            asked, said = (" ".join(draw.choices(words, k=draw.randint(*span))) for span in ((8, 40), (5, 140)))
            asked += f" {number}"
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
    """Seconds and peak memory of one command: its own, and resident with mapped files. Exits where it fails."""
    environment = os.environ | {"FTRUN_CACHE": str(folder / "cache")}
    started, own = time.perf_counter(), 0
    with (folder / "said").open("w") as said:
        process = subprocess.Popen([sys.executable, "-m", "ftrun", *words], stderr=said, stdout=said, env=environment)
        ended = 0
        while not ended:
            own = max(own, _anonymous(process.pid))
            time.sleep(0.1)
            ended, status, used = os.wait4(process.pid, os.WNOHANG)
    seconds = time.perf_counter() - started
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit((folder / "said").read_text())
    return {"seconds": seconds, "bytes": own, "resident": used.ru_maxrss * 1024}


def _anonymous(pid: int) -> int:
    """Memory of a process that no file backs."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--scratch", type=Path, help="folder with room for pool and tokens: 5 KB a row")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "RAYON_NUM_THREADS": str(options.threads)}
    from ftrun.runs.lockfile import processor

    print(f"{processor()}, float32, {options.threads} threads")
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        make_model(folder / "model")
        make_pool(folder / "pool.jsonl", 100)  # the demo's model is converted once, which is not what is measured
        measure(
            ["select", "recipe=random", "budget=10", f"data.path={folder / 'pool.jsonl'}", f"out={folder / 'first'}"],
            folder,
        )
        for size in options.sizes:
            make_pool(folder / "pool.jsonl", size)
            for name in options.recipes:
                shutil.rmtree(folder / "cache" / "data", ignore_errors=True)
                words = [*RECIPES[name], f"data.path={folder / 'pool.jsonl'}", f"out={folder / f'{name}-{size}'}"]
                words += [f"launch.threads={options.threads}"]
                words += [f"model.path={folder / 'model'}"] * (name in OWN_MODEL)
                line = {"recipe": name, "rows": size, **measure(words, folder)}
                before = next((one for one in reversed(lines) if one["recipe"] == name), None)
                if before:
                    line["for_ten_times"] = line["seconds"] / before["seconds"] * 10 / (size / before["rows"])
                lines.append(line)
                print(
                    f"{name:8} {size:>9,} rows {line['seconds']:8.1f} s {line['bytes'] / 1e9:6.2f} GB own "
                    f"{line['resident'] / 1e9:6.2f} GB resident"
                    + (f"  {line['for_ten_times']:5.1f}x for 10x" if before else ""),
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(lines, indent=1))
    sys.exit(any(line.get("for_ten_times", 0) > AT_MOST for line in lines))


if __name__ == "__main__":
    main()
