"""The script of a job, and what is refused before there is one. No Slurm: its commands are stood in for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from ftrun import cli
from ftrun.cluster.script import Job, Member, options, render
from ftrun.config.cluster import ClusterConfig, read_cluster, seconds_of
from ftrun.config.grammar import normal_override
from ftrun.errors import ConfigError


def job(tmp_path: Path, *members: Member, program: list[str] | None = None) -> Job:
    return Job(
        typed=["train", "recipe=lora_sft"],
        verb="train",
        name="ftrun-lora_sft",
        members=list(members) or [Member(["recipe=lora_sft"], "runs/a")],
        sweeps=len(members) > 1,
        folder=tmp_path / "cluster",
        start_in=tmp_path,
        program=program or ["ftrun"],
    )


def cluster_of(*words: str) -> ClusterConfig:
    return read_cluster([normal_override(word) for word in words])


def test_options(tmp_path):
    """Everything that was asked for, as sbatch spells it, and nothing that was not."""
    asked = cluster_of(
        *(
            "cluster.nodes=2",
            "cluster.gpus_per_node=8",
            "cluster.cpus_per_task=4",
            "cluster.mem=64G",
            "cluster.time=4:00:00",
        ),
        *("cluster.partition=007", "cluster.account=a", "cluster.qos=q", "cluster.constraint=a100|h100"),
        *("cluster.signal_seconds=60", "cluster.requeue=false", "cluster.sbatch=[--exclusive,--mail-type=END]"),
    )
    assert set(options(job(tmp_path), asked)) == {
        *("--job-name=ftrun-lora_sft", f"--output={tmp_path}/cluster/slurm-%j.out", "--open-mode=append"),
        *(f"--chdir={tmp_path}", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--cpus-per-task=32"),
        *("--mem=64G", "--time=4:00:00", "--partition=007", "--account=a", "--qos=q", "--constraint='a100|h100'"),
        *("--signal=B:USR1@60", "--no-requeue", "--exclusive", "--mail-type=END"),
    }
    plain = options(job(tmp_path), ClusterConfig())
    assert not [
        line for line in plain if line.startswith(("--mem", "--time", "--gpus", "--cpus", "--partition", "--array"))
    ]


def run_script(tmp_path: Path, text: str, act=None, **variables: str) -> tuple[int, str, list[str]]:
    """The script under bash, with stand-ins for Slurm's commands: exit code, the words of the run, what scontrol was told."""
    stands = tmp_path / "bin"
    stands.mkdir(exist_ok=True)
    # like the real one, srun hands its signals on and ends with its task's code
    (stands / "srun").write_text(
        '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\n"$@" & task=$!\n'
        "trap 'kill -USR1 $task' USR1; trap 'kill $task' TERM\n"
        "while :; do wait $task; code=$?; kill -0 $task 2>/dev/null || break; done\n"
        "wait $task 2>/dev/null; last=$?; ((last < 0 || last == 127)) || code=$last; exit $code\n"
    )
    (stands / "scontrol").write_text(
        f'#!/bin/bash\necho "$@" >>{tmp_path}/told\n'
        'case $2 in hostnames) echo n1; echo n2 ;; node) echo "NodeName=n1 NodeAddr=10.0.0.1 NodeHostName=n1" ;; esac\n'
    )
    (stands / "task").write_text(
        "#!/bin/bash\ntrap 'exit 143' TERM USR1\n"
        f'echo "$@" >{tmp_path}/words\n'
        "for _ in {1..200}; do sleep 0.05; [[ -z $ENDS ]] || exit $ENDS; done\n"
    )
    for file in stands.iterdir():
        file.chmod(0o755)
    (tmp_path / "told").unlink(missing_ok=True)
    (tmp_path / "words").unlink(missing_ok=True)
    environment = os.environ | {"PATH": f"{stands}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "ENDS": ""} | variables
    process = subprocess.Popen(["bash", "-c", text], cwd=tmp_path, env=environment, start_new_session=True)
    if act:
        deadline = time.monotonic() + 10
        while not (tmp_path / "words").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        # as Slurm does: a warning goes to the script alone, the end to all
        (os.killpg if act == signal.SIGTERM else os.kill)(process.pid, act)
    code = process.wait(timeout=20)
    told = (tmp_path / "told").read_text().splitlines() if (tmp_path / "told").exists() else []
    return code, (tmp_path / "words").read_text().strip(), [line for line in told if line.startswith("requeue")]


@pytest.mark.parametrize(
    ("act", "variables", "code", "requeued"),
    [
        (signal.SIGUSR1, {}, 143, ["requeue 17"]),  # SIGUSR1: the time limit is near
        (signal.SIGUSR1, {"SLURM_RESTART_COUNT": "50"}, 143, []),
        (signal.SIGTERM, {}, 143, []),  # cancelled or preempted, which is Slurm's own matter
        (None, {"ENDS": "0"}, 0, []),
        (None, {"ENDS": "143"}, 143, []),  # stopped by hand
        *((None, {"ENDS": str(code)}, code, []) for code in (2, 3, 4, 5)),
    ],
)
def test_when_the_job_queues_itself_again(tmp_path, act, variables, code, requeued):
    text = render(job(tmp_path, program=["task"]), ClusterConfig())
    assert run_script(tmp_path, text, act, **variables) == (code, "train recipe=lora_sft out=runs/a", requeued)


def test_without_requeue(tmp_path):
    text = render(job(tmp_path, program=["task"]), ClusterConfig(requeue=False))
    assert run_script(tmp_path, text, signal.SIGUSR1) == (143, "train recipe=lora_sft out=runs/a", [])


def test_the_second_start_resumes(tmp_path):
    """A folder that holds a run is resumed; so is one whose name means something to the shell and to our grammar."""
    strange = "runs/it's, $HOME {a}"
    for out in ("runs/a", strange):
        text = render(
            job(tmp_path, Member(["recipe=lora_sft", "prompt='a \"b\" $c'"], out), program=["task"]), ClusterConfig()
        )
        for key in ("out", "resume"):
            _, words, _ = run_script(tmp_path, text, ENDS="0")
            found = words.partition("$c' ")[2]
            assert found.startswith(f"{key}=")
            assert read_value(found) == out
            (tmp_path / out).mkdir(parents=True, exist_ok=True)
            (tmp_path / out / "identity.json").touch()


def read_value(word: str) -> str:
    from ftrun.config.explain import parse

    return str(parse([normal_override(word)])[0].value())


def test_machines_and_elements(tmp_path):
    """Several machines are told where to meet; an element of an array finds its own run; setup comes first and must work."""
    text = render(job(tmp_path, program=["task"]), ClusterConfig(nodes=2, gpus_per_node=8))
    _, words, _ = run_script(tmp_path, text, ENDS="0", SLURM_RESTART_COUNT="1")
    assert (
        words == "train recipe=lora_sft out=runs/a launch.nodes=2 launch.processes=8 launch.rendezvous=10.0.0.1:21026"
    )
    members = [Member([f"seed={seed}"], f"runs/{seed}") for seed in range(3)]
    text = render(job(tmp_path, *members, program=["task"]), ClusterConfig(processes=2, setup=["export ENDS=0"]))
    assert run_script(tmp_path, text, SLURM_ARRAY_TASK_ID="2")[:2] == (0, "train seed=2 out=runs/2 launch.processes=2")
    assert "--array=0-2%2" in options(job(tmp_path, *members), ClusterConfig(array=2))
    failing = render(job(tmp_path, program=["task"]), ClusterConfig(setup=["false"]))
    assert subprocess.run(["bash", "-c", failing], cwd=tmp_path).returncode == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cluster.node=2"], 'Did you mean "nodes"?'),
        (["cluster.nodes=0"], "above 0"),
        (["cluster.nodes=two"], "takes int"),
        (["cluster.nodes=1,2"], "several values"),
        (["cluster.nodes.x=1"], 'no key "cluster.nodes.x"'),
        (["cluster=kubernetes"], "docs/cluster.md"),
        (["cluster=none.yaml"], "there is no file none.yaml"),
        (["~cluster"], "cannot be taken away"),
        (["cluster.time=4h"], "no time limit"),
        (["cluster.time=1"], "the signal to save"),
        (["cluster.processes=9", "cluster.gpus_per_node=8"], "cannot share"),
        (["cluster.sbatch=[exclusive]"], "no option of sbatch"),
        (["cluster.partition='a\nb'"], "one line"),
        (["launch.nodes=2"], "Write cluster.nodes."),
        (["launch.rendezvous=a:1"], "the job sets launch.rendezvous"),
        (["hydra.sweep.dir=x"], "Hydra"),
        (["adapter.q=2"], "adapter"),
        (["recipe=lora_stf"], "lora_sft"),
        (["train.batch_size=1", "cluster.nodes=2"], "2 processes cannot share"),
        (["--cfg", "job"], "does not take --cfg"),
    ],
)
def test_refused(tmp_path, monkeypatch, capsys, words, said):
    """With exit code 2, before anything is written."""
    monkeypatch.chdir(tmp_path)
    assert cli.entry(["submit", "train", "recipe=lora_sft", *words]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", [*cli.HYDRA_VERBS])
def test_no_other_verb_takes_the_section(verb, capsys):
    if verb == "show":
        assert cli.entry(["show", "recipe=lora_sft", "cluster.nodes=2"]) == 0
        assert "cluster.nodes" in capsys.readouterr().out
        return
    assert cli.entry([verb, "cluster.nodes=2"]) == 2
    assert "ftrun submit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("1:30", 90), ("04:00:00", 14400), ("1-12", 129600), ("1-0:0:5", 86405), ("UNLIMITED", None)],
)
def test_times(time, seconds):
    assert seconds_of(time) == seconds


def test_a_sites_file(tmp_path):
    """Its values are defaults of the command line; a time needs no quotes."""
    file = tmp_path / "site.yaml"
    file.write_text('partition: gpu\ntime: "10:00:00"\ngpus_per_node: 4\n')
    found = cluster_of(f"cluster={file}", "cluster.gpus_per_node=2")
    assert (found.partition, found.time, found.gpus_per_node) == ("gpu", "10:00:00", 2)
    file.write_text("time: 10:00:00\n")
    assert cluster_of(f"cluster={file}").time == "10:00:00"
    file.write_text("nodez: 2\n")
    with pytest.raises(ConfigError, match="nodez"):
        cluster_of(f"cluster={file}")


def test_dry_run(tmp_path, monkeypatch, capsys):
    """The script on standard output, with every run of the sweep; nothing is written, and no Slurm is needed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    line = ["submit", "-m", "train", "recipe=lora_sft", "seed=0,1", "train.epochs=1,2", "cluster.dry_run=true"]
    assert cli.entry(line) == 0
    script = capsys.readouterr().out
    assert "# ftrun submit -m train recipe=lora_sft seed=0,1 train.epochs=1,2 cluster.dry_run=true\n" in script
    assert "#SBATCH --array=0-3\n" in script
    assert "2) command+=(recipe=lora_sft seed=1 train.epochs=1) out=runs/lora_sft/" in script
    assert cli.entry([*line, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 4
    assert not list(tmp_path.iterdir())
    assert cli.entry(["submit", "train", "recipe=lora_sft", "out=a"]) == 2
    assert "sbatch is not installed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def stand_in(folder: Path, monkeypatch, **programs: str) -> None:
    """Commands of Slurm that say what they are told to."""
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("complaint", "code"),
    [("sbatch: error: invalid partition specified: gpu", 2), ("sbatch: error: Unable to contact slurm controller", 5)],
)
def test_a_job_that_slurm_refuses_leaves_nothing(tmp_path, monkeypatch, capsys, complaint, code):
    place, stands = tmp_path / "place", tmp_path / "bin"
    place.mkdir()
    stands.mkdir()
    monkeypatch.chdir(place)
    stand_in(stands, monkeypatch, sbatch=f"echo '{complaint}' >&2; exit 1")
    assert cli.entry(["submit", "train", "recipe=lora_sft", "out=a"]) == code
    assert complaint.removeprefix("sbatch: error: ") in capsys.readouterr().err
    assert not list(place.iterdir())


def test_from_submission_to_cancelling(tmp_path, monkeypatch, capsys):
    """What was submitted is found by job, element and folder; a second job on the same folder is refused while it waits."""
    place, stands = tmp_path / "place", tmp_path / "bin"
    place.mkdir()
    stands.mkdir()
    monkeypatch.chdir(place)
    queue = "7_0|RUNNING|None|1:02:03|n1\n7_1|PENDING|Priority|1-00:00:00|"
    stand_in(stands, monkeypatch, sbatch="echo 7", squeue=f"printf '{queue}\n'", scancel=f"echo $@ >>{place}/told")
    line = ["submit", "-m", "train", "recipe=lora_sft", "seed=0,1", "out=sweep"]
    assert cli.entry(line) == 0
    assert capsys.readouterr().out == "7\n"
    assert (place / "sweep" / "cluster" / "job.sh").read_text().startswith("#!/bin/bash\n# ftrun submit -m train")
    for words, states in {
        ("7",): ["running", "queued"],
        ("7_1",): ["queued"],
        ("sweep",): ["running", "queued"],
        ("sweep/0",): ["running"],
        (): ["running", "queued"],
    }.items():
        assert cli.entry(["status", *words, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["runs"]
        assert sorted(one["state"] for one in found) == sorted(states), words
    assert cli.entry(["status"]) == 0
    assert "seed=1" in capsys.readouterr().err
    assert cli.entry(line) == 2
    assert "job 7_0 works on sweep/0: running" in capsys.readouterr().err
    assert [cli.entry(["cancel", what]) for what in ("7_1", "sweep/0", "7")] == [0, 0, 0]
    assert (place / "told").read_text().split() == ["7_1", "7_0", "7"]
    assert cli.entry(["cancel", "8"]) == 2
