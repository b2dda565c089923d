"""Jobs on a real Slurm of two nodes, which scripts/slurm_testbed.sh starts: whatever happens to a job, it ends with the
weights of a run that nothing happened to.

Runs where Debian's slurm-wlm and munge are installed and the user is root; FTRUN_SLURM=1 makes their absence a failure.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ftrun import cli, registry

pytestmark = pytest.mark.slow

SCRIPT = registry.PACKAGE.parent / "scripts" / "slurm_testbed.sh"
PROGRAMS = ("sbatch", "slurmctld", "slurmd", "munged")
STEPS = 400
# for one process or two: plain descent, for Adam makes much of the last bit of a sum; no dropout, which each process draws
COMMAND = [
    *("train", "recipe=lora_sft", "data.max_length=64", f"train.max_steps={STEPS}", "train.batch_size=4"),
    *("train.eval_before=false", "train.save_steps=50", "eval=[]", "optim=sgd", "optim.learning_rate=0.1"),
    "adapter.lora_dropout=0",
]
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class Testbed:
    """Slurm's answers about the jobs of this file."""

    __test__ = False

    def __init__(self, folder: Path):
        self.folder = folder

    def ask(self, *command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    def facts(self, job: str) -> dict[str, str]:
        text = self.ask("scontrol", "show", "job", "--oneliner", job)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait_for(self, job: str, *states: str, seconds: float = 90) -> dict[str, str]:
        deadline = time.monotonic() + seconds
        while (facts := self.facts(job))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {job} is {facts['JobState']}, not {states}"
            time.sleep(0.1)
        return facts

    def start_now(self, job: str, *changes: str) -> None:
        """A job that was queued again waits for two minutes; this one no longer than its new credential needs."""
        self.wait_for(job, "PENDING")
        time.sleep(2)  # of the second in which it was queued, Slurm says that the credential was revoked
        self.ask("scontrol", "update", f"jobid={job}", "StartTime=now", *changes)


@pytest.fixture(scope="module")
def testbed(tmp_path_factory):
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [program for program in PROGRAMS if not shutil.which(program, path=path)]
    reason = f"not installed: {', '.join(missing)} (Debian: slurm-wlm, munge)" if missing else ""
    reason = reason or ("a testbed of Slurm needs root" if os.geteuid() else "")
    if reason and os.environ.get("FTRUN_SLURM") == "1":
        pytest.fail(f"FTRUN_SLURM=1, but {reason}")
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([SCRIPT, "start", folder], check=True, timeout=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        try:
            yield Testbed(folder)
        finally:
            subprocess.run([SCRIPT, "stop", folder], check=True, timeout=60)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_dir, rows):
    """The folder that all jobs work in, with the rows, and what an undisturbed run on this machine leaves."""
    folder = tmp_path_factory.mktemp("jobs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", str(registry.PACKAGE.parent))
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert cli.entry([*COMMAND, f"model.path={tiny_dir}", "data.path=rows.jsonl", "out=undisturbed"]) == 0
        yield folder


@pytest.fixture
def submit(place, tiny_dir, capsys) -> Callable[..., str]:
    def submit(*words: str) -> str:
        capsys.readouterr()
        line = ["submit", *COMMAND, f"model.path={tiny_dir}", "data.path=rows.jsonl", "cluster.time=10", *words]
        assert cli.entry(line) == 0
        return capsys.readouterr().out.strip()

    return submit


def weights(out: str) -> dict[str, np.ndarray]:
    return load_file(Path(out) / "adapter" / "adapter_model.safetensors")


def assert_undisturbed(out: str, tolerance: float = 0.0) -> None:
    expected, found = weights("undisturbed"), weights(out)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=tolerance, err_msg=name)
    assert json.loads((Path(out) / "summary.json").read_text())["steps"] == STEPS


def step_of(out: str) -> int:
    file = Path(out) / "train" / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


def wait_for_step(out: str, step: int, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while step_of(out) < step:
        assert time.monotonic() < deadline, f"{out} is at step {step_of(out)}, not {step}"
        time.sleep(0.05)


def read_status(capsys, *words: str) -> list[dict]:
    capsys.readouterr()
    assert cli.entry(["status", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["runs"]


def test_preempted_then_out_of_time(testbed, submit, capsys):
    """Slurm's own requeue, and ours before the time limit: the same job, the same folder, the same weights."""
    job = submit("out=stopped", "cluster.signal_seconds=175")
    wait_for_step("stopped", 20)
    testbed.ask("scontrol", "requeue", job)
    testbed.start_now(job)
    assert json.loads(Path("stopped/summary.json").read_text())["status"] == "preempted"
    before = step_of("stopped")
    wait_for_step("stopped", before + 20)
    hold_until_signalled("stopped", lambda: testbed.ask("scontrol", "update", f"jobid={job}", "TimeLimit=3"))
    testbed.start_now(job, "TimeLimit=10")
    (found,) = read_status(capsys, "stopped")
    assert before < found["step"] < STEPS
    facts = testbed.wait_for(job, *OVER)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "2")
    assert_undisturbed("stopped")


def hold_until_signalled(out: str, act: Callable[[], object], seconds: float = 60) -> None:
    """Stop the run, so that it cannot end before Slurm, which looks at time limits twice a minute, has signalled it."""
    pid = json.loads((Path(out) / ".lock").read_text())["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        act()
        deadline = time.monotonic() + seconds
        while not pending(pid) >> (signal.SIGUSR1 - 1) & 1:
            assert time.monotonic() < deadline, "no SIGUSR1 came"
            time.sleep(0.1)
    finally:
        os.kill(pid, signal.SIGCONT)


def pending(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"ShdPnd:\s*(\w+)", status)[1], 16)  # type: ignore[index]


def test_two_nodes_of_which_one_is_killed(testbed, submit, capsys):
    """One agent a node: together they train what one process does. When Slurm has given a node up, it queues the job again;
    with the node back, the run goes on."""
    job = submit("out=lost", "cluster.nodes=2")
    wait_for_step("lost", 60)
    assert testbed.facts(job)["NodeList"] == "n[1-2]"
    kill_node(testbed.folder, job, "n2")
    testbed.wait_for(job, "PENDING")
    subprocess.run([SCRIPT, "node", testbed.folder, "n2"], check=True, timeout=30)
    testbed.start_now(job)
    facts = testbed.wait_for(job, *OVER)
    log = Path(f"lost/cluster/slurm-{job}.out").read_text()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), log
    assert_undisturbed("lost", tolerance=1e-5)
    (found,) = read_status(capsys, job)
    assert (found["state"], found["step"], found["steps"], found["out"]) == ("done", STEPS, STEPS, "lost")


def kill_node(folder: Path, job: str, node: str) -> None:
    """What is left of a node without power: its daemon, the daemon of the job's step, and the job's processes are gone."""
    doomed = {int((folder / f"slurmd.{node}.pid").read_text())}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            words = (entry / "environ").read_bytes().split(b"\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if f"SLURMD_NODENAME={node}".encode() in words and f"SLURM_JOB_ID={job}".encode() in words:
            doomed |= {int(entry.name), parent}
    for pid in doomed - {1}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_cancelled(testbed, submit, capsys, tiny_dir):
    """A cancelled job has saved, and does not come back by itself; resume= goes on."""
    job = submit("out=ended")
    wait_for_step("ended", 20)
    assert cli.entry(["cancel", "ended"]) == 0
    testbed.wait_for(job, "CANCELLED")
    deadline = time.monotonic() + 30
    while read_status(capsys, job)[0]["job_state"] == "COMPLETING" or not Path("ended/summary.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    (found,) = read_status(capsys, job)
    assert (found["state"], found["job_state"]) == ("cancelled", "CANCELLED")
    assert 20 <= found["step"] < STEPS
    assert cli.entry([*COMMAND, f"model.path={tiny_dir}", "data.path=rows.jsonl", "resume=ended"]) == 0
    assert_undisturbed("ended")


def test_a_failure_stays_a_failure(testbed, place, tiny_dir, capsys):
    """An array is one element a run; one that fails is not queued again, and its exit code is the job's."""
    Path("empty.jsonl").write_text('{"instruction": "what", "output": ""}\n')
    capsys.readouterr()
    line = ["submit", "-m", *COMMAND, f"model.path={tiny_dir}", "data.path=empty.jsonl", "seed=0,1", "out=sweep"]
    assert cli.entry(line) == 0
    job = capsys.readouterr().out.strip()
    codes = []
    for element in ("0", "1"):
        facts = testbed.wait_for(f"{job}_{element}", *OVER)
        codes.append((facts["JobState"], facts["ExitCode"].partition(":")[0], facts["Restarts"]))
    assert codes == [("FAILED", "3", "0")] * 2
    found = read_status(capsys, job)
    assert [(one["changes"], one["state"], one["out"]) for one in found] == [
        (["seed=0"], "failed", "sweep/0"),
        (["seed=1"], "failed", "sweep/1"),
    ]
