"""Loading: what is found, what is refused, and that a folder needs no network."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from ftrun.config.settings import ModelConfig
from ftrun.errors import ConfigError, ResourceError
from ftrun.models import load, source
from ftrun.models.load import fingerprint, load_bundle, load_config, load_tokenizer, meta_model, resolve_dtype
from ftrun.registry import build


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTRUN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tiny_dir, tmp_path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_dir, tmp_path / "model"))


def config(path: Path | str, **knobs) -> ModelConfig:
    return ModelConfig(path=str(path), **knobs)


def test_bundle(tiny_dir):
    bundle = load_bundle(config(tiny_dir), task="causal", quant=build("quant", "none"), device=torch.device("cpu"))
    assert bundle.dtype == next(bundle.model.parameters()).dtype == resolve_dtype("auto", torch.device("cpu"))
    assert not bundle.model.training and bundle.architecture.causal and bundle.architecture.tied
    assert (
        bundle.context_length == 512 and bundle.path == str(tiny_dir) and bundle.pad_id == bundle.tokenizer.pad_token_id
    )
    assert bundle.fingerprint == fingerprint(config(tiny_dir))


def test_a_folder_needs_no_network(tiny_dir, monkeypatch):
    from huggingface_hub import constants

    def refuse(*args, **kwargs):
        pytest.fail("a local folder led to a network call")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_bundle(config(tiny_dir), task="causal")
    load_config(config(tiny_dir))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_dtype(tiny_dir, name):
    bundle = load_bundle(config(tiny_dir, dtype=name), task="causal")
    assert bundle.dtype == getattr(torch, name) == bundle.model.lm_head.weight.dtype


@pytest.mark.parametrize("answer", [False, True])
def test_auto_dtype_is_float32_on_every_cpu(answer, monkeypatch):
    for owner, name in (
        (torch.cpu, "_is_amx_tile_supported"),
        (torch.cpu, "_is_avx512_bf16_supported"),
        (torch.ops.mkldnn, "_is_mkldnn_bf16_supported"),
    ):
        monkeypatch.setattr(owner, name, lambda: answer)
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32


def test_classifier(tiny_dir):
    bundle = load_bundle(config(tiny_dir), task="classify", labels=3)
    assert bundle.model.config.num_labels == 3 and not bundle.architecture.causal
    assert bundle.architecture.head_name == "score" and len(bundle.architecture.layers) == 2


def test_nf4(tiny_dir):
    bundle = load_bundle(config(tiny_dir), task="causal", quant=build("quant", "nf4"))
    layer = bundle.architecture.layers[0]
    assert layer.self_attn.q_proj.weight.dtype == torch.uint8
    assert bundle.architecture.linear_names(["q"]) == ["q_proj"] and bundle.architecture.plain_head


def test_meta_model_has_the_parameters_and_no_memory(tiny_dir):
    loaded = load_bundle(config(tiny_dir), task="causal").model
    shape = meta_model(config(tiny_dir), "causal")
    assert {n: p.shape for n, p in shape.named_parameters()} == {n: p.shape for n, p in loaded.named_parameters()}
    assert all(parameter.is_meta for parameter in shape.parameters())


def test_missing_folder_offers_the_nearest(folder):
    with pytest.raises(ConfigError, match="there is no folder") as caught:
        load_tokenizer(config(folder.with_name("modle")))
    assert f'Did you mean "{folder}"?' in str(caught.value)


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("config.json", "no config.json"),
        ("tokenizer.json", "no tokenizer"),
        ("model.safetensors", "no model.safetensors"),
    ],
)
def test_incomplete_folder(folder, gone, words):
    (folder / gone).unlink()
    with pytest.raises(ConfigError, match=words):
        load_bundle(config(folder), task="causal")


def test_missing_shard_is_named(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    with pytest.raises(ConfigError, match=r"model-00002-of-00002\.safetensors is missing"):
        load_bundle(config(folder), task="causal")


def test_pickles_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError) as caught:
        load_bundle(config(folder), task="causal")
    assert "pickle" in str(caught.value)


def test_adapter_folder_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds an adapter"):
        load_config(config(tmp_path))


def test_weights_of_another_model_are_refused(folder):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match=r"weight files lack model\.layers\.2"):
        load_bundle(config(folder), task="causal")


def test_vocabulary_mismatch(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"vocabulary mismatch.*<new>"):
        load_bundle(config(folder), task="causal")


def test_hub_id_without_network_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(source, "_hub_answers", lambda: False)
    with pytest.raises(ConfigError, match="not on this machine, and the hub cannot be reached"):
        load_tokenizer(config("nobody/nothing"))


@pytest.mark.parametrize(("status", "answers"), [(200, True), (404, True), (None, False)])
def test_is_the_hub_there(monkeypatch, status, answers):
    """A server that answers anything is there; a closed port is not."""
    from huggingface_hub import constants

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    if status is None:
        server.server_close()
    else:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert source._hub_answers() == answers
    if status is not None:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("path", ["builtin:smolm2_135m", "not a name", "gone.gguf", "./gone"])
def test_wrong_names(path):
    with pytest.raises(ConfigError):
        load_config(config(path))


def test_own_code_needs_the_setting(folder):
    settings = json.loads((folder / "config.json").read_text()) | {
        "model_type": "homemade",
        "auto_map": {"AutoConfig": "c.C"},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="brings its own code"):
        load_config(config(folder))


def test_not_enough_memory(tiny_dir, monkeypatch):
    class Hungry:
        @staticmethod
        def from_pretrained(*args, **kwargs):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 1 byte")

    monkeypatch.setattr(load, "_auto_class", lambda task: Hungry)
    with pytest.raises(ResourceError, match="not enough memory"):
        load_bundle(config(tiny_dir), task="causal")


def test_padding_is_never_the_end_of_a_turn(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    chosen = load_tokenizer(config(folder))
    assert (
        chosen.pad_token not in (chosen.eos_token, chosen.bos_token, None)
        and chosen.pad_token in chosen.all_special_tokens
    )
    assert chosen("yes no!").input_ids == tokenizer("yes no!").input_ids


def test_no_ordinary_word_becomes_padding(folder):
    """With one special token only (GPT-2), padding stays without a token and batches use id 0."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] == "<|im_end|>"]
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"})
    )
    bundle = load_bundle(config(folder), task="causal")
    assert bundle.tokenizer.pad_token is None and bundle.pad_id == 0


def test_fingerprint_follows_content_not_place(folder, tiny_dir):
    before = fingerprint(config(tiny_dir))
    assert fingerprint(config(folder)) == before
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert fingerprint(config(folder)) != before
    assert fingerprint(config(tiny_dir)) == before


def test_fingerprint_follows_the_template(folder, tiny_dir):
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert fingerprint(config(folder)) != fingerprint(config(tiny_dir))


def test_gemma2_gets_eager_attention(caplog):
    from transformers import Gemma2Config

    assert load.attention_for(Gemma2Config(), "sdpa", torch.device("cpu")) == "eager"
    assert load.attention_for(Gemma2Config(), "flash_attention_2", torch.device("cuda")) == "flash_attention_2"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention(tiny_dir, attention):
    model = load_bundle(config(tiny_dir, attention=attention), task="causal").model
    assert model.config._attn_implementation.startswith(attention)
    assert "_attn_implementation" not in model.config.to_json_string()
