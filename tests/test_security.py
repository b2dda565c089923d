"""Files of others cannot run code, reach beyond their folder, or carry a secret into a run's record."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from pathlib import Path

import pytest

from ftrun import cli, registry
from ftrun.config.settings import ModelConfig
from ftrun.errors import ConfigError, FtrunError
from ftrun.scrub import HIDDEN, scrub, scrubbed

MARK = "ran-as-code"


class Runs:
    """What a pickle does when it is read."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


@pytest.fixture
def model(tiny_dir, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_dir, tmp_path / "model"))


def load(model: Path) -> None:
    from ftrun.models.load import load_bundle

    load_bundle(ModelConfig(path=str(model)), task="causal")


# ---- pickles and code ----


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_weights_in_a_pickle_are_refused(name, model, tmp_path):
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Runs(tmp_path / MARK)))
    with pytest.raises(ConfigError, match=r"pickle|safetensors"):
        load(model)
    assert not (tmp_path / MARK).exists()


def test_an_adapter_in_a_pickle_is_refused(tiny_dir, tmp_path):
    """Of a run and of a reference model."""
    from peft import LoraConfig

    from ftrun.models.source import safe_adapter

    LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Runs(tmp_path / MARK)))
    with pytest.raises(ConfigError, match="pickle"):
        safe_adapter(tmp_path)
    assert not (tmp_path / MARK).exists()


def test_arrays_never_hold_objects():
    """Every np.load in the package says allow_pickle=False or leaves that default; nothing unpickles."""
    for file in registry.PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}, file
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert given.get("allow_pickle", "False") == "False", file
                assert called != "torch.load" or given.get("weights_only") == "True", file
                types = file.name in ("registry.py", "peft_types.py")  # annotations of source code, without builtins
                assert called not in ("yaml.unsafe_load", "yaml.full_load", "eval", "exec") or types, file


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_a_model_does_not_run_unasked(name, model, tmp_path):
    """``auto_map`` and a model type or tokenizer class of its own: refused, with the key that allows it."""
    (model / "evil.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / MARK)!r}).touch()\n")
    about = json.loads((model / name).read_text())
    own = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    about |= (
        {"auto_map": own, "model_type": "evil"} if name == "config.json" else {"auto_map": own, "tokenizer_class": "T"}
    )
    (model / name).write_text(json.dumps(about))
    with pytest.raises(ConfigError, match="brings its own code"):
        load(model)
    assert not (tmp_path / MARK).exists()


@pytest.mark.parametrize("inside", ["../outside.safetensors", "/etc/hostname"])
def test_weights_outside_of_their_folder_are_refused(inside, model):
    (model / "model.safetensors").rename(model.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": inside}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="outside"):
        load(model)


# ---- chat templates ----

ATTACKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('/etc/passwd').read() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self._TemplateReference__context }}{{ lipsum.__globals__ }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('id') }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{{ ['x'] * 10**9 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{% set x = namespace(t='x') %}{% for i in range(60) %}{% set x.t = x.t ~ x.t %}{% endfor %}",
    "{% set x = namespace(t='x') %}{% for i in range(60) %}{% set x.t = x.t + x.t %}{% endfor %}",
    "{{ '%1000000000d' % 3 }}",
    "{{ '%1000000000d'|format(3) }}",
    "{{ '{:1000000000d}'.format(3) }}",
    "{{ 'x'.ljust(10**9) }}",
    "{{ 'x'|center(10**9) }}",
    "{{ messages.append(1) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("own", [True, False], ids=["tokenizer", "file"])
def test_a_hostile_template_is_refused(attack, own, tokenizer, tmp_path):
    """It is refused in bounded time and memory, or writes nothing but the emptiness that an unknown name is."""
    from ftrun.data.chat import ChatTemplate
    from ftrun.data.records import Message
    from ftrun.data.render import apply_template

    file = tmp_path / "t.jinja"
    file.write_text(attack)
    try:
        if own:
            tokenizer.chat_template = attack
        else:
            apply_template(tokenizer, str(file))
        template = ChatTemplate(tokenizer)
        text = template.conversation([Message("user", "q"), Message("assistant", "a")]).text(2, False)
    except FtrunError as error:
        assert error.exit_code in (2, 3)
    else:
        assert "root:" not in text and "class" not in text and len(text) < 10_000


# ---- secrets ----

SECRETS = {
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrSt",
    "WANDB_API_KEY": "0123456789abcdef0123",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG",
    "MY_DB_PASSWORD": "correct<horse>&'battery'",
    "SERVICE_SECRET": "staple-staple-staple",
}


def test_addresses_and_tokens_are_hidden(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    for value in SECRETS.values():
        assert value not in scrub(f"a {value} b") and value not in str(FtrunError("x", f"data.path={value}", value))
    assert scrub("https://me:pass@host/x?token=abc123&y=1") == f"https://{HIDDEN}@host/x?token={HIDDEN}&y=1"
    assert scrubbed({"a": ["hf_" + "x" * 30]}) == {"a": [HIDDEN]}
    for plain in ("hf://datasets/a/b", "a@b.c", "data/rows?.jsonl", "seed=3&4", "https://host/a"):
        assert scrub(plain) == plain


def test_a_run_holds_no_secret(tiny_dir, rows_file, tmp_path, monkeypatch, capfd):
    """In none of its files, on neither stream: not of the environment, and not of the words that were typed."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    words = [
        f"data.system=by {SECRETS['SERVICE_SECRET']}",
        "data.system=https://me:typed-password@host/x?token=typed-token",
    ]
    for number, word in enumerate(words):
        line = ["train", "--json", "recipe=lora_sft", f"model.path={tiny_dir}", f"data.path={rows_file}", word]
        line += [
            f"out={tmp_path / f'run{number}'}",
            "eval=[]",
            "data.heldout=0",
            "train.max_steps=1",
            "train.batch_size=2",
        ]
        assert cli.entry(line) == 0
    assert (
        cli.entry(["train", "recipe=sft", f"data.path=https://me:typed-password@host/{SECRETS['HF_TOKEN']}.jsonl"]) == 3
    )
    said = "".join(capfd.readouterr())
    hidden = [*SECRETS.values(), "typed-password", "typed-token"]
    assert not [secret for secret in hidden if secret in said]
    for file in tmp_path.glob("run*/**/*"):
        if file.is_file():
            content = file.read_bytes()
            assert not [secret for secret in hidden if secret.encode() in content], file
    assert HIDDEN in (tmp_path / "run0/config.yaml").read_text()
