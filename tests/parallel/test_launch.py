"""Launchers: the variables of torchrun, of srun, and of neither, as these programs set them."""

from dataclasses import replace

import pytest

from megalite.parallel.launch import JOB_PORTS, LaunchInfo, detect, first_host, tasks_on_node

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
    "MASTER_ADDR": "node1", "MASTER_PORT": "29500",
}  # fmt: skip
BATCH_SHELL = {
    "SLURM_JOB_ID": "1234", "SLURM_NTASKS": "10",
    "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
    "SLURM_JOB_NODELIST": "gpu[03-05]", "SLURM_TASKS_PER_NODE": "4(x2),2",
}  # fmt: skip
SRUN = BATCH_SHELL | {
    "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "10", "SLURM_STEP_NODELIST": "gpu[03-05]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),2",
    "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
}  # fmt: skip
ALONE = LaunchInfo(
    rank=0, world_size=1, local_rank=0, local_world_size=1, init_method="", source="none"
)


def test_torchrun():
    found = detect(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert found == LaunchInfo(
        rank=5,
        world_size=8,
        local_rank=1,
        local_world_size=4,
        init_method="tcp://node1:29500",
        source="torchrun",
        address_source="MASTER_ADDR and MASTER_PORT",
        hosts_store=False,
    )
    assert detect(TORCHRUN).hosts_store


def test_rank_and_world_size_by_hand_mean_one_node():
    given = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    found = detect(given)
    assert (found.local_rank, found.local_world_size) == (1, 2)


def test_srun():
    port = 10_000 + (1234 * 31 + 2) % 20_000
    last = LaunchInfo(
        rank=9,
        world_size=10,
        local_rank=1,
        local_world_size=2,
        init_method=f"tcp://gpu03:{port}",
        source="srun",
        incarnation="1234.2.0",
        address_source="SLURM_STEP_NODELIST and SLURM_JOB_ID",
    )
    assert detect(SRUN) == last
    first = detect(SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"})
    assert first == replace(last, rank=0, local_rank=0, local_world_size=4)


def port_of(launch: LaunchInfo) -> int:
    return int(launch.init_method.rpartition(":")[2])


def test_steps_of_a_job_meet_at_ports_of_their_own():
    ports = set()
    for step in range(30):
        ports.add(port_of(detect(SRUN | {"SLURM_STEP_ID": str(step)})))
    assert len(ports) == 30 and ports < set(JOB_PORTS)


def test_a_requeued_job_does_not_meet_those_that_its_first_start_left_behind():
    ports = {port_of(detect(SRUN))}
    incarnations = {detect(SRUN).incarnation}
    for count in range(1, 30):
        start = detect(SRUN | {"SLURM_RESTART_COUNT": str(count)})
        ports.add(port_of(start))
        incarnations.add(start.incarnation)
    assert len(ports) == len(incarnations) == 30 and ports < set(JOB_PORTS)
    assert detect(SRUN | {"SLURM_RESTART_COUNT": "0"}) == detect(SRUN)


def test_srun_takes_a_given_meeting_point():
    found = detect(SRUN | {"MASTER_ADDR": "ib0", "MASTER_PORT": "77"})
    assert found.init_method == "tcp://ib0:77"
    assert found.address_source == "MASTER_ADDR and MASTER_PORT"
    found = detect(SRUN | {"MASTER_PORT": "77"})
    assert found.init_method == "tcp://gpu03:77"
    assert found.address_source == "SLURM_STEP_NODELIST and MASTER_PORT"


def test_a_step_smaller_than_its_allocation():
    step = {
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "gpu05",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_PROCID": "1", "SLURM_NODEID": "0",
    }  # fmt: skip
    launch = detect(SRUN | step)
    assert (launch.rank, launch.world_size, launch.local_world_size) == (1, 2, 2)
    assert launch.init_method.startswith("tcp://gpu05:")


def test_torchrun_inside_a_slurm_step_is_torchrun():
    assert detect(SRUN | TORCHRUN).source == "torchrun"


def test_a_shell_that_is_no_step_is_a_single_process():
    for environ in ({}, BATCH_SHELL, BATCH_SHELL | {"SLURM_STEP_ID": "4294967291"}):
        assert detect(environ) == ALONE


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_variable_of_torchrun_is_named(missing):
    with pytest.raises(ValueError, match=missing):
        detect(without(TORCHRUN, missing))


@pytest.mark.parametrize("missing", ["SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID"])
def test_a_missing_variable_of_srun_is_named(missing):
    with pytest.raises(ValueError, match=missing):
        detect(without(SRUN, missing))


def without(environ: dict[str, str], name: str) -> dict[str, str]:
    rest = dict(environ)
    del rest[name]
    return rest


@pytest.mark.parametrize("port", ["0", "-1", "65536"])
def test_a_port_out_of_range_is_an_error(port):
    for environ in (TORCHRUN, SRUN):
        with pytest.raises(ValueError, match=f"MASTER_PORT={port}; a port from 1 to 65535"):
            detect(environ | {"MASTER_PORT": port})


def test_an_empty_address_is_missing():
    with pytest.raises(ValueError, match="but not MASTER_ADDR"):
        detect(TORCHRUN | {"MASTER_ADDR": ""})


def test_a_variable_that_is_no_number_is_shown():
    with pytest.raises(ValueError, match="WORLD_SIZE='many'"):
        detect(TORCHRUN | {"WORLD_SIZE": "many"})
    with pytest.raises(ValueError, match="RANK=8 with WORLD_SIZE=8; ranks are 0 to 7"):
        detect(TORCHRUN | {"RANK": "8"})


def test_one_rank_needs_no_meeting_point():
    assert detect({"RANK": "0", "WORLD_SIZE": "1"}).world_size == 1


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node7", "node7"),
        ("node7,node8", "node7"),
        ("gpu[003-006,9],login", "gpu003"),
        ("login,gpu[1-2]", "login"),
        ("gpu-a[9,12]", "gpu-a9"),
        ("n[1-2]-ib,m3", "n1-ib"),
        ("rack[1-2]n[05,7-9]", "rack1n05"),
        ("host.example.org", "host.example.org"),
        (" n[10] ", "n10"),
    ],
)
def test_first_host(nodelist, host):
    assert first_host(nodelist) == host


@pytest.mark.parametrize("nodelist", ["", ",a", "gpu[", "gpu[]", "gpu[a-b]", "gpu]1", "a b"])
def test_no_node_list(nodelist):
    with pytest.raises(ValueError, match="cannot read the SLURM node list"):
        first_host(nodelist)


def test_tasks_on_node():
    for tasks_per_node, expected in {"4(x2),2": [4, 4, 2], "3,1,2(x3)": [3, 1, 2, 2, 2]}.items():
        assert [tasks_on_node(tasks_per_node, n) for n in range(len(expected))] == expected
    assert tasks_on_node("8", 0) == 8
    with pytest.raises(ValueError, match="no node number 3"):
        tasks_on_node("4(x2),2", 3)
    for text in ("", "4(2)", "x"):
        with pytest.raises(ValueError, match="cannot read SLURM_STEP_TASKS_PER_NODE"):
            tasks_on_node(text, 0)
