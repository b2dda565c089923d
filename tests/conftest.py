"""Small models and rows that every test may use. Random weights for structure; the real model is in `smollm2` (slow).

``--processor=avx2|avx512bf16`` has torch and bitsandbytes believe in that processor: no result may depend on it.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import json
from pathlib import Path

import pytest
import warm_processes
from slowest_files import pytest_terminal_summary  # noqa: F401

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "then",
    "answers:",
    "yes",
    "no",
    "0",
    "1",
    "2",
    "3",
    "4",
    "5",
    "6",
    "7",
    "8",
    "9",
    "system",
    "user",
    "assistant",
    "what",
    "is",
    "plus",
]


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer with chat markers and a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>", unk_token="<|endoftext|>"
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)


def pytest_addoption(parser):
    parser.addoption("--processor", choices=["real", "avx2", "avx512bf16"], default="real")


@pytest.fixture(scope="session", autouse=True)
def processor(request):
    """The processor's answers about bfloat16, as ``--processor`` says."""
    choice = request.config.getoption("--processor")
    if choice == "real":
        yield
        return
    import bitsandbytes.functional
    import bitsandbytes.nn.modules
    import torch

    checks = [
        (bitsandbytes.functional, "has_avx512bf16"),
        (bitsandbytes.nn.modules, "has_avx512bf16"),
        (torch.cpu, "_is_avx512_bf16_supported"),
        (torch.cpu, "_is_amx_tile_supported"),
        (torch.ops.mkldnn, "_is_mkldnn_bf16_supported"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in checks:
            patch.setattr(owner, name, lambda: choice == "avx512bf16")
        yield


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A folder with the tokenizer of `tiny_dir` alone: made without torch."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


@pytest.fixture
def tokenizer(tokenizer_dir):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> Path:
    """A folder with a random 2-layer Llama (width 32) and a tokenizer with a ChatML template."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    make_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows() -> list[dict[str, str]]:
    """Twenty-four alpaca rows of different length, each different."""
    return [
        {
            "instruction": f"what is {i} plus {i % 5}",
            "input": "the dog" if i % 3 == 0 else "",
            "output": ("answers: " + "yes no " * (1 + i % 6) + str(i)),
        }
        for i in range(24)
    ]


@pytest.fixture
def rows_file(rows, tmp_path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def pytest_collection_finish() -> None:
    """Torch and its friends bring a million objects that live as long as the tests: they are not searched for garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="session", autouse=True)
def warm_workers():
    """The launcher's workers start from a server that has made the imports."""
    warm_processes.start_workers_warm()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """A run takes one thread a process, however many cores there are: sums do not depend on them, and test workers share them."""
    warm_processes.use_one_thread()


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Two processes of one group, for command lines that two processes carry out."""
    from pair import Pair

    both = Pair(tmp_path_factory.mktemp("pair"))
    yield both
    both.close()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Stage outputs and tokenised data of tests stay apart from the user's; converted models are shared."""
    from ftrun.runs.artifacts import cache_dir

    models = cache_dir() / "models"
    cache = tmp_path_factory.mktemp("cache")
    models.mkdir(parents=True, exist_ok=True)
    (cache / "models").symlink_to(models)
    monkeypatch.setenv("FTRUN_CACHE", str(cache))
    monkeypatch.delenv("FTRUN_DEBUG", raising=False)


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def pairs_file(tmp_path) -> Path:
    rows = [
        {"prompt": f"what is {i} plus 1", "chosen": f"answers: {i + 1}", "rejected": "the lazy dog " * (1 + i % 3)}
        for i in range(16)
    ]
    return write_rows(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def text_file(tmp_path) -> Path:
    return write_rows(
        tmp_path / "text.jsonl",
        [{"text": f"the quick brown fox {i} jumps over " + "a dog and " * (i % 5)} for i in range(16)],
    )


@pytest.fixture
def labels_file(tmp_path) -> Path:
    rows = [
        {"text": f"the dog answers {'yes' if i % 2 else 'no'} {i}", "label": "good" if i % 2 else "bad"}
        for i in range(24)
    ]
    return write_rows(tmp_path / "labels.jsonl", rows)


@pytest.fixture
def rows_for(rows_file, pairs_file, text_file, labels_file) -> dict[str, Path]:
    """A file of rows of each kind."""
    return {"sft": rows_file, "pairs": pairs_file, "text": text_file, "labels": labels_file}


@pytest.fixture(scope="session")
def tiny_encoder_dir(tmp_path_factory) -> Path:
    """A folder with a random 2-layer BERT encoder and a word tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    vocabulary = {
        word: i
        for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "answers", *dict.fromkeys(WORDS)])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=128,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def reference_dir(tiny_dir, tmp_path) -> Path:
    """The tiny model with its weights moved a little."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_dir)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path / "trained" / "model"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(folder)
    return folder
