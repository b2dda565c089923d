"""`ftrun doctor`."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from ftrun.reporting import doctor as module
from ftrun.reporting.doctor import Finding
from ftrun.runs import cores

CPU_ONLY = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False))


def test_every_finding_that_is_not_ok_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = module.doctor()
    assert {
        "python",
        "torch",
        "cores",
        "memory",
        "run folder",
        "cache",
        "bfloat16",
        "4-bit weights",
        "model hub",
        "demo model",
    } <= {finding.subject for finding in found}
    assert all(finding.todo for finding in found if finding.status != "ok")
    assert all(finding.why for finding in found)


def test_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "doctor", lambda: [Finding("cores", "ok", "2")])
    module.print_doctor(as_json=True)
    assert json.loads(capsys.readouterr().out) == [{"subject": "cores", "status": "ok", "why": "2", "todo": ""}]
    module.print_doctor()
    assert "cores" in capsys.readouterr().out


def test_the_lock_is_compared(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text("# comment == 1\ntorch==2.13.0\nlm_eval==0.4.13\n")
    assert module.locked_versions(lock) == {"torch": "2.13.0", "lm-eval": "0.4.13"}
    assert module.locked_versions(tmp_path / "absent") == {}
    assert module._package("numpy", "0.1", "").status == "unsure"
    assert module._package("no-such-package", None, "pip install it").todo == "pip install it"


@pytest.mark.parametrize(
    ("speeds", "status", "words"),
    [
        ((1.6, 1.15), "ok", "pays for scoring and training"),
        ((1.6, 0.9), "ok", "pays for scoring;"),
        ((0.02, 0.06), "slow", "Leave model.dtype=auto"),
    ],
)
def test_bf16_is_said_to_pay_where_it_was_measured_to(speeds, status, words, monkeypatch) -> None:
    monkeypatch.setattr(module, "bf16_speed", lambda torch: speeds)
    (finding,) = module.bf16(CPU_ONLY)
    assert finding.status == status and words in finding.todo and "float32" in finding.why


def test_the_measurement_takes_about_a_second() -> None:
    import time

    import torch

    started = time.process_time()
    scoring, training = module.bf16_speed(torch)
    assert scoring > 0 and training > 0
    assert time.process_time() - started < 8


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module.tempfile, "TemporaryFile", refuse)
    monkeypatch.setenv("FTRUN_CACHE", str(tmp_path / "not" / "yet"))
    found = {finding.subject: finding for finding in module.disks()}
    assert found["cache"].status == "missing" and "Permission denied" in found["cache"].why
    assert "FTRUN_CACHE" in found["cache"].todo


@pytest.mark.parametrize(
    ("said", "status", "threads"),
    [(None, None, 8), ("8", None, 8), ("1", "slow", 1), ("4,2", "slow", 4), ("16", "slow", 16), ("all", "unsure", 8)],
)
def test_what_is_said_of_threads_is_what_a_run_takes(
    monkeypatch: pytest.MonkeyPatch, said: str | None, status: str | None, threads: int
) -> None:
    for place in (module, cores):
        monkeypatch.setattr(place, "usable_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    found = {finding.subject: finding for finding in module.processor()}
    assert found["cores"].status == "ok"
    assert (found["threads"].status if "threads" in found else None) == status
    assert cores.threads_per_process(None, processes=1) == threads
    assert cores.threads_per_process(3, processes=2) == 3


def test_a_silent_hub_does_not_hold_one_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that accepts and never answers."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        (finding,) = module.hub(seconds=0.2)
    assert finding.status == "missing" and "0.2 s" in finding.why


@pytest.mark.parametrize(("present", "status"), [(True, "ok"), (False, "unsure")])
def test_the_demo_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, present: bool, status: str) -> None:
    monkeypatch.setenv("FTRUN_CACHE", str(tmp_path))
    monkeypatch.setattr(module.importlib.metadata, "version", lambda name: "0.1.2")
    folder = module.smollm2_folder()
    if present:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
    assert [finding.status for finding in module.demo_model()] == [status]
