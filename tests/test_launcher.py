"""Which rank a process is: from torch's, SLURM's and MPI's words, and one line where they are malformed."""

import runpy

import pytest

from dtrain.errors import UserError
from dtrain.launcher import adopt, first_host, leave
from tests.printed import ROOT

SRUN = {
    "SLURM_JOB_ID": "812",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_NTASKS": "9",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[07-08,11]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
TORCH = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}


def adopted(environment: dict[str, str], **more) -> dict[str, str]:
    environment = dict(environment)
    adopt(environment, **more)
    return environment


def ranks(environment: dict[str, str]) -> tuple:
    return tuple(environment.get(k) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"))


def test_the_tasks_of_an_srun_are_ranks_that_meet_at_its_first_node():
    found = adopted(SRUN)
    assert ranks(found) == ("4", "5", "0", "1", "gpu07")
    other = adopted(SRUN | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"})
    assert ranks(other) == ("0", "5", "0", "2", "gpu07")
    assert other["MASTER_PORT"] == found["MASTER_PORT"]
    assert adopted(SRUN | {"SLURM_JOB_ID": "813"})["MASTER_PORT"] != found["MASTER_PORT"]
    alone = SRUN | {"SLURM_STEP_TASKS_PER_NODE": "5", "SLURM_NODEID": "0"}
    assert ranks(adopted(alone)) == ("4", "5", "0", "5", "127.0.0.1")


def test_a_batch_script_and_a_step_of_one_task_are_no_ranks():
    script = {"SLURM_JOB_ID": "812", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert "RANK" not in adopted(script)
    assert "RANK" not in adopted(SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})
    assert adopted(script | {"SLURM_PROCID": "1", "SLURM_JOB_NODELIST": "n1"})["RANK"] == "1"  # an older srun's step


def test_mpirun_on_one_machine_needs_nothing_more_and_on_several_an_address():
    assert ranks(adopted(OPEN_MPI)) == ("1", "2", "1", "2", "127.0.0.1")
    several = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    with pytest.raises(UserError, match="pass MASTER_ADDR and MASTER_PORT to all ranks"):
        adopted(several)
    assert ranks(adopted(several | {"MASTER_ADDR": "a"}))[4] == "a"
    intel = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
    assert ranks(adopted(intel)) == ("0", "2", "0", "2", "127.0.0.1")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[07-08,11]", "gpu07"),
        ("gpu3", "gpu3"),
        ("a,b[1-2]", "a"),
        ("rack1-node[001-128].cluster", "rack1-node001.cluster"),
        ("", None),
    ],
)
def test_the_first_host_of_a_list_of_nodes(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"RANK": ""}, "RANK in the environment is '', not a whole number from 0 on"),
        ({"RANK": "one"}, "RANK in the environment is 'one'"),
        ({"RANK": "2"}, "RANK in the environment is 2, but WORLD_SIZE is 2: ranks count from 0"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE in the environment is '0', not a whole number from 1 on"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE in the environment is '0'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK in the environment is '-1'"),
        ({"MASTER_ADDR": ""}, "this is rank 1 of 2, but MASTER_ADDR is not set"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT in the environment is 'http'"),
    ],
)
def test_a_malformed_environment_is_one_line(changed, message):
    with pytest.raises(UserError, match=message):
        adopted(TORCH | changed)


def test_half_of_a_launchers_environment_is_refused():
    for name in ("RANK", "WORLD_SIZE"):
        with pytest.raises(UserError, match=f"the environment has {name} but no"):
            adopted({name: "1"})


def test_the_option_of_torchs_launcher_is_the_local_rank_where_the_environment_has_none():
    assert adopted(TORCH, local_rank="1")["LOCAL_RANK"] == "1"
    assert adopted(TORCH | {"LOCAL_RANK": "0"}, local_rank="1")["LOCAL_RANK"] == "0"


def test_a_command_that_is_never_distributed_is_no_rank():
    environment = dict(TORCH)
    leave(environment)
    assert environment == {"MASTER_ADDR": "a", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("script", [*ROOT.glob("launch/*.py"), *ROOT.glob("eval/*.py")], ids=lambda path: path.name)
def test_a_process_that_a_rank_spawns_does_not_begin_the_command_again(script, monkeypatch):
    """It imports the script under another name."""
    monkeypatch.setattr("sys.argv", [str(script)])  # with which the command would end the process
    assert "main" in runpy.run_path(str(script), run_name="__mp_main__")
