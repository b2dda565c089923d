"""Groups of processes that another launcher started."""

from __future__ import annotations

import pytest

from ftrun.config.settings import LaunchConfig
from ftrun.errors import ConfigError
from ftrun.training.foreign import first_host, found, join

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_ID": "0",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MEETS = {"MASTER_ADDR": "alpha", "MASTER_PORT": "29501"}


@pytest.mark.parametrize(
    ("variables", "address", "port"),
    [
        (TORCHRUN | MEETS, "alpha", "29501"),
        (SRUN, "gpu07", "20123"),
        (SRUN | MEETS, "alpha", "29501"),
        (OPEN_MPI | MEETS, "alpha", "29501"),
    ],
    ids=["torchrun", "srun", "srun-told", "mpirun"],
)
def test_its_variables_become_those_of_torch(variables, address, port):
    environment, launch = dict(variables), LaunchConfig()
    join(launch, (), environment)
    assert (launch.processes, launch.nodes) == (2, 2)
    wanted = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    wanted |= {"MASTER_ADDR": address, "MASTER_PORT": port}
    assert {key: environment[key] for key in wanted} == wanted


@pytest.mark.parametrize("variables", [TORCHRUN, SRUN, OPEN_MPI], ids=["torchrun", "srun", "mpirun"])
def test_another_number_than_was_asked_for_is_refused(variables):
    with pytest.raises(ConfigError, match=r"2 processes were asked for, .* has started 4"):
        join(LaunchConfig(processes=2), {"launch.processes"}, dict(variables))
    join(LaunchConfig(processes=4), {"launch.processes"}, dict(variables) | MEETS)


def test_a_process_on_its_own_is_no_group():
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}  # a batch script, before any srun
    one = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_ID": "7"}
    assert found({}) is found(batch) is found(one) is found({"PMI_RANK": "0", "PMI_SIZE": "1"}) is None


def test_launchers_that_meet_are_not_workers():
    environment, launch = dict(SRUN), LaunchConfig(nodes=2, rendezvous="gpu07:29500")
    join(launch, {"launch.nodes"}, environment)
    assert environment == SRUN and launch.processes == 1


def test_machines_that_cannot_know_where_to_meet():
    with pytest.raises(ConfigError, match="does not say where they meet"):
        join(LaunchConfig(), (), dict(OPEN_MPI))


def test_one_process_of_accelerate_instead_of_several():
    """What `accelerate launch --cpu --num_processes 2` leaves in the environment of the one process that it starts."""
    alone = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"}
    join(LaunchConfig(), (), alone)
    with pytest.raises(ConfigError, match="several processes and has started one"):
        join(LaunchConfig(), (), alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[07-09,12],cpu1", "gpu07"), ("alpha", "alpha"), ("a1,a2", "a1"), ("r[1,3]n2", "r1n2")],
)
def test_the_first_machine_of_a_list(nodes, first):
    assert first_host(nodes) == first
