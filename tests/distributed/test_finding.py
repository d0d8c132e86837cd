"""Which cluster a process was started in: from environments as each scheduler sets them, and from flags."""

from __future__ import annotations

import http.server
import threading

import pytest

from sealion_jax import train
from sealion_jax.distributed import DistributedConfig, find_cluster
from sealion_jax.distributed.finding import note_on_lone
from sealion_jax.distributed.slurm import expand_nodes, port_of
from sealion_jax.distributed.tpu import read_metadata
from sealion_jax.errors import UserError

# As srun's manual page has the variables, for task 5 of eight on two nodes of four GPUs each.
SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NODELIST": "gpu[07,12-13]",
    "SLURM_JOB_NUM_NODES": "3",
    "SLURM_STEP_NODELIST": "gpu[07,12]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURMD_NODENAME": "gpu12",
    "SLURM_GPUS_ON_NODE": "4",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3",
}
ONE_TASK_A_NODE = SLURM | {
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
# The shell of an sbatch script: what it has beside the job's own variables.
SBATCH = {
    "SLURM_JOB_ID": "4242",
    "SLURM_JOB_NODELIST": "gpu[07,12]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "2",
    "SLURM_TASKS_PER_NODE": "1(x2)",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURMD_NODENAME": "gpu07",
    "SLURM_GPUS_ON_NODE": "4",
}
# The shell that salloc opens where LaunchParameters has use_interactive_step: a step of one task.
SALLOC = SBATCH | {
    "SLURM_STEP_ID": "4294967290",
    "SLURM_STEP_NODELIST": "gpu07",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_STEP_NUM_NODES": "1",
}
# As GKE sets them in a pod of a v5p slice of two hosts; JobSet adds those of several slices.
GKE = {
    "TPU_WORKER_ID": "1",
    "TPU_WORKER_HOSTNAMES": "run-slice-0-0.run,run-slice-0-1.run",
    "TPU_ACCELERATOR_TYPE": "v5p-16",
    "TPU_TOPOLOGY": "2x2x2",
    "TPU_CHIPS_PER_HOST_BOUNDS": "2,2,1",
    "TPU_HOST_BOUNDS": "1,1,2",
    "TPU_SKIP_MDS_QUERY": "true",
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
}
TWO_SLICES = GKE | {
    "TPU_WORKER_ID": "0",
    "TPU_WORKER_HOSTNAMES": "run-slice-1-0.run,run-slice-1-1.run",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "run-slice-0-0.run:8080",
    "JOBSET_NAME": "run",
    "JOBSET_RESTART_ATTEMPT": "2",
}
# As `mpirun -n 2` of Open MPI 4.1.4 set them.
OPEN_MPI = {
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "590675968.0;tcp://192.0.2.2:35437;tcp6://[fd00::2]:42183",
    "PMIX_NAMESPACE": "590675969",
}
FLAGS = DistributedConfig(coordinator_address="node1:5000", num_processes=3, process_id=2)


# As launch/gke/render.py gives them to the pods of GPU nodes.
JOB_SET = {"JOBSET_NAME": "run/8c1f", "JOBSET_RESTART_ATTEMPT": "3", "JOBSET_UID": "8c1f"}


def find(environ, metadata=None, gpus=None, **options):
    return find_cluster(environ, DistributedConfig(**options), metadata=metadata, gpus=gpus)


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


def test_nothing_is_found_where_there_is_nothing():
    assert find({}) is None
    assert find({"PATH": "/bin", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n[001-003,7],m1", ["n001", "n002", "n003", "n7", "m1"]),
        ("gpu-a[08-11]", ["gpu-a08", "gpu-a09", "gpu-a10", "gpu-a11"]),
        ("a,b.site.org,c[1,3]", ["a", "b.site.org", "c1", "c3"]),
        ("r[1-2]n[01-02]x", ["r1n01x", "r1n02x", "r2n01x", "r2n02x"]),
    ],
)
def test_node_lists_are_spelt_out(text, names):
    assert list(expand_nodes(text)) == names


@pytest.mark.parametrize("text", ["", "n[", "n[1-]", "n[a-b]", "n 1", "n[1];rm"])
def test_what_is_no_node_list_is_refused(text):
    with pytest.raises(UserError, match="SLURM_STEP_NODELIST"):
        expand_nodes(text)


def test_slurm_tasks_know_their_place_and_take_their_share_of_the_gpus():
    found = find(SLURM)
    assert found is not None
    assert (found.kind, found.num_processes, found.process_id) == ("slurm", 8, 5)
    assert found.coordinator_address == f"gpu07:{port_of(4242, '0', 0)}"
    assert found.node == "gpu12"
    assert found.nodes == ("gpu07", "gpu12")
    assert found.hosts == ("gpu07",) * 4 + ("gpu12",) * 4
    assert (found.visible_devices, found.expected_devices) == ((1,), 1)
    assert found.name == "slurm job 4242"


def test_the_only_slurm_task_of_a_node_takes_all_its_gpus():
    found = find(ONE_TASK_A_NODE)
    assert found is not None
    assert (found.visible_devices, found.expected_devices) == (None, 4)
    assert found.hosts == ("gpu07", "gpu12")


def test_gpus_that_slurm_has_given_to_a_task_already_are_not_divided_once_more():
    found = find(SLURM | {"CUDA_VISIBLE_DEVICES": "0"})  # --gpus-per-task 1
    assert found is not None
    assert (found.visible_devices, found.expected_devices) == (None, 1)


def test_fewer_gpus_for_a_task_than_its_part_of_the_node_are_what_slurm_gave():
    """Four tasks of a GPU each on a node of eight: --ntasks-per-node 4 --gpus-per-task 1."""
    found = find(SLURM | {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "6"})
    assert found is not None
    assert (found.visible_devices, found.expected_devices) == (None, 1)
    none_shown = find(SLURM | {"CUDA_VISIBLE_DEVICES": ""})
    assert none_shown is not None
    assert none_shown.expected_devices == 1


def test_tasks_that_are_dealt_out_like_cards_have_no_host_guessed():
    found = find(SLURM | {"SLURM_DISTRIBUTION": "cyclic"})
    assert found is not None
    assert (found.hosts, found.nodes) == ((), ("gpu07", "gpu12"))


def test_a_requeued_job_and_another_step_have_other_ports_and_words():
    kinds = [find(SLURM | more) for more in ({}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_STEP_ID": "1"})]
    assert len({one.coordinator_address for one in kinds if one}) == 3
    assert len({one.word for one in kinds if one}) == 3
    assert kinds[1] is not None
    assert kinds[1].name == "slurm job 4242 (restart 1)"
    assert all(61440 <= port_of(job, "0", restarts) < 65536 for job in range(9999) for restarts in range(9))


def test_a_shell_within_a_job_is_no_task():
    config = DistributedConfig()
    assert find(SBATCH) is None
    alone = find(SALLOC)
    assert alone is not None
    assert alone.num_processes == 1
    note = note_on_lone(SBATCH, config)
    assert note is not None
    assert "4242 has 2 nodes" in note
    assert "srun" in note
    assert note_on_lone(SLURM, config) is None
    assert note_on_lone(SBATCH | {"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "1"}, config) is None
    assert note_on_lone(SBATCH, DistributedConfig(cluster="none")) is None


def test_gke_workers_of_a_slice():
    found = find(GKE)
    assert found is not None
    assert (found.kind, found.num_processes, found.process_id) == ("gke-tpu", 2, 1)
    assert found.coordinator_address == "run-slice-0-0.run:8482"
    assert found.hosts == ("run-slice-0-0.run", "run-slice-0-1.run")
    assert (found.node, found.expected_devices) == ("run-slice-0-1.run", 4)


def test_gke_workers_of_several_slices():
    found = find(TWO_SLICES)
    assert found is not None
    assert (found.num_processes, found.process_id, found.restarts) == (4, 2, 2)
    assert found.coordinator_address == "run-slice-0-0.run:8482"
    assert found.node == "run-slice-1-0.run"
    first = find(TWO_SLICES | {"MEGASCALE_SLICE_ID": "0", "TPU_WORKER_HOSTNAMES": "run-slice-0-0.run,x"})
    assert first is not None
    assert (first.word, first.process_id) == (found.word, 0)


def test_gke_with_one_host_is_one_process():
    found = find(GKE | {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"})
    assert found is not None
    assert found.num_processes == 1


def test_a_worker_number_that_is_none_is_named():
    with pytest.raises(UserError, match="TPU_WORKER_ID is 'x'"):
        find(GKE | {"TPU_WORKER_ID": "x"})


@pytest.mark.parametrize(
    ("environ", "missing"),
    [
        *((SLURM, name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS")),
        *((SLURM, name) for name in ("SLURM_STEP_NODELIST", "SLURM_PROCID")),
        *((GKE, name) for name in ("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES")),
        *((OPEN_MPI, name) for name in ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")),
        *((TWO_SLICES, name) for name in ("MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")),
        (TWO_SLICES, "MEGASCALE_COORDINATOR_ADDRESS"),
    ],
)
def test_one_of_several_that_is_told_half_does_not_train_alone(environ, missing):
    with pytest.raises(UserError, match=f"{missing} is not set.*--cluster none"):
        find(without(environ, missing))
    alone = find(without(environ, missing), cluster="none")
    assert alone is None or alone.num_processes == 1
    config = {"coordinator_address": "node1:5000", "num_processes": 3, "process_id": 2}
    assert find(without(environ, missing), **config) is not None


@pytest.mark.parametrize(
    "environ",
    [
        without(SALLOC, "SLURM_PROCID"),
        {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"},
        {"TPU_WORKER_ID": "0"},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_one_that_is_told_half_and_is_the_only_one_may_train_alone(environ):
    assert find(environ) is None


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        (SLURM | {"SLURM_PROCID": "8"}, "SLURM_PROCID is 8, but SLURM_STEP_NUM_TASKS says that there are 8"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "0"}, "SLURM_STEP_NUM_TASKS is 0; expected at least 1"),
        (GKE | {"TPU_WORKER_ID": "2"}, "TPU_WORKER_ID is 2, but TPU_WORKER_HOSTNAMES says that there are 2"),
        (TWO_SLICES | {"TPU_WORKER_ID": "2"}, "TPU_WORKER_ID is 2, but TPU_WORKER_HOSTNAMES says"),
        (TWO_SLICES | {"MEGASCALE_SLICE_ID": "2"}, "MEGASCALE_SLICE_ID is 2, but MEGASCALE_NUM_SLICES says"),
        (GKE | {"TPU_WORKER_HOSTNAMES": ","}, "TPU_WORKER_HOSTNAMES names no host for some of its 2"),
        (
            OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "2"},
            "OMPI_COMM_WORLD_RANK is 2, but OMPI_COMM_WORLD_SIZE says",
        ),
        (TWO_SLICES | {"JOBSET_RESTART_ATTEMPT": "x"}, "JOBSET_RESTART_ATTEMPT is 'x'"),
    ],
)
def test_numbers_that_cannot_be_are_told_by_the_schedulers_names(environ, told):
    with pytest.raises(UserError) as error:
        find(environ)
    assert str(error.value).startswith(told)


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("[fd00::2]:8080", "[fd00::2]"),
        ("[fd00::2]", "[fd00::2]"),
        ("fd00::2", "[fd00::2]"),
        ("10.0.0.2:8080", "10.0.0.2"),
        ("node1", "node1"),
    ],
)
def test_slices_meet_at_a_host_by_name_or_number(address, host):
    found = find(TWO_SLICES | {"MEGASCALE_COORDINATOR_ADDRESS": address})
    assert found is not None
    assert found.coordinator_address == f"{host}:8482"


TPU_ENV = "ACCELERATOR_TYPE: 'v5p-16'\nCHIPS_PER_HOST_BOUNDS: '2,2,1'\nNODE_ID: 'my-run'\nWORKER_ID: '1'\n"


@pytest.fixture
def metadata_server():
    """A server that answers as a TPU VM's metadata server does, to those who send its header."""
    values = {
        "agent-worker-number": "1",
        # The older form: name:id:address.
        "worker-network-endpoints": "a:1:10.0.0.2,b:2:10.0.0.3",
        "tpu-env": TPU_ENV,
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            value = values.get(self.path.rpartition("/")[2])
            right = self.path.startswith("/computeMetadata/v1/instance/attributes/")
            if self.headers.get("Metadata-Flavor") != "Google" or not right or value is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(value.encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield read_metadata(f"127.0.0.1:{server.server_address[1]}", patience_seconds=1), values
    server.shutdown()
    server.server_close()


def test_cloud_tpu_vm_asks_its_metadata(metadata_server):
    read, values = metadata_server
    found = find({}, read)
    assert found is not None
    assert (found.kind, found.num_processes, found.process_id) == ("cloud-tpu-vm", 2, 1)
    assert (found.coordinator_address, found.node) == ("10.0.0.2:8482", "10.0.0.3")
    assert (found.expected_devices, found.name) == (4, "Cloud TPU my-run")
    values["tpu-env"] = TPU_ENV + "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
    values["tpu-env"] += "MEGASCALE_COORDINATOR_ADDRESS: '10.0.1.7'\n"
    values["worker-network-endpoints"] = "10.0.0.2,10.0.0.3"
    found = find({}, read)
    assert found is not None
    assert (found.num_processes, found.process_id) == (4, 3)
    assert found.coordinator_address == "10.0.1.7:8482"
    del values["agent-worker-number"]
    assert find({}, read) is None


def test_a_metadata_server_that_does_not_answer_is_told():
    with pytest.raises(UserError, match="metadata server did not give agent-worker-number"):
        find({}, read_metadata("127.0.0.1:9", patience_seconds=0.2), cluster="tpu-vm")


def test_open_mpi_processes_meet_where_mpirun_runs():
    found = find(OPEN_MPI)
    assert found is not None
    assert (found.kind, found.num_processes, found.process_id) == ("open-mpi", 2, 1)
    assert found.coordinator_address.rpartition(":")[0] == "192.0.2.2"
    six = find(OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "590675968.0;tcp6://[fd00::2]:42183"})
    assert six is not None
    assert six.coordinator_address.startswith("[fd00::2]:")


@pytest.mark.parametrize(
    ("environ", "gpus", "share"),
    [
        ({}, None, ((1,), None)),  # nobody knows how many there are
        ({}, 8, ((4, 5, 6, 7), 4)),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 8, ((2, 3), 2)),
        ({"CUDA_VISIBLE_DEVICES": "5"}, 8, (None, 1)),  # a script gave each its own
        ({"CUDA_VISIBLE_DEVICES": ""}, 8, (None, None)),
        ({"JAX_PLATFORMS": "cpu"}, 8, (None, None)),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, 8, (None, 8)),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}, 2, ((1,), 1)),
    ],
)
def test_open_mpi_processes_share_the_gpus_of_their_node(environ, gpus, share):
    found = find(OPEN_MPI | environ, gpus=gpus)
    assert found is not None
    assert (found.visible_devices, found.expected_devices) == share


def test_processes_that_mpirun_started_within_slurm_are_open_mpis():
    """Its helper on each node is a task of Slurm's, whose variables its processes have as well."""
    helper = SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "gpu12"}
    found = find(helper | OPEN_MPI)
    assert found is not None
    assert (found.kind, found.num_processes, found.process_id) == ("open-mpi", 2, 1)
    slurm = find(SLURM | OPEN_MPI, cluster="slurm")
    assert slurm is not None
    assert slurm.kind == "slurm"


def test_open_mpi_that_does_not_say_where_needs_an_address():
    environ = without(OPEN_MPI, "OMPI_MCA_orte_hnp_uri")
    with pytest.raises(UserError, match="--coordinator-address"):
        find(environ)
    found = find(environ, coordinator_address="node1:5000")
    assert found is not None
    assert (found.coordinator_address, found.process_id) == ("node1:5000", 1)


def test_flags_win_over_every_cluster():
    found = find_cluster(SLURM | GKE, FLAGS)
    assert found is not None
    assert (found.kind, found.coordinator_address, found.process_id) == ("flags", "node1:5000", 2)


def test_pods_on_gpus_know_which_start_of_their_job_set_they_are():
    found = find_cluster(JOB_SET, FLAGS)
    assert found is not None
    assert (found.kind, found.process_id, found.job_id, found.restarts) == ("flags", 2, "run/8c1f", 3)
    assert found.name == "JobSet run/8c1f (restart 3)"
    before = find_cluster(JOB_SET | {"JOBSET_RESTART_ATTEMPT": "2"}, FLAGS)
    assert before is not None
    assert before.word != found.word
    without_one = find_cluster({}, FLAGS)
    assert without_one is not None
    assert (without_one.name, without_one.word, without_one.job_id) == ("flags", "", None)


@pytest.mark.parametrize("cluster", ["none", "auto"])
def test_the_only_pod_of_a_job_set_knows_which_start_it_is(cluster):
    alone = find(JOB_SET, cluster=cluster)
    assert alone is not None
    assert (alone.num_processes, alone.process_id) == (1, 0)
    assert (alone.job_id, alone.restarts) == ("run/8c1f", 3)
    with pytest.raises(UserError, match="no cluster was found"):
        find(JOB_SET, cluster=cluster, coordinator_address="10.0.0.9:77")


def test_an_address_alone_replaces_the_clusters():
    found = find(SLURM, coordinator_address="10.0.0.9:77")
    assert found is not None
    assert (found.kind, found.coordinator_address, found.process_id) == ("slurm", "10.0.0.9:77", 5)
    with pytest.raises(UserError, match="no cluster was found"):
        find({}, coordinator_address="10.0.0.9:77")


def test_a_kind_can_be_forced_and_forbidden():
    assert find(SLURM | GKE, cluster="none") is None
    forced = find(SLURM | GKE, cluster="gke")
    assert forced is not None
    assert forced.kind == "gke-tpu"
    for kind, word in (("slurm", "SLURM_STEP_ID"), ("gke", "TPU_WORKER_ID"), ("open-mpi", "mpirun")):
        with pytest.raises(UserError, match=word):
            find(SBATCH, cluster=kind)
    with pytest.raises(UserError, match="no such kind; known: auto, none"):
        find({}, cluster="slurms")


@pytest.mark.parametrize(
    "given", [{"num_processes": 2}, {"process_id": 0}, {"num_processes": 2, "process_id": 0}]
)
def test_half_of_what_joining_needs_is_refused_with_the_options_of_the_command(given, capsys):
    with pytest.raises(UserError) as error:
        DistributedConfig(**given)
    with pytest.raises(SystemExit):
        train.main(["--help"])
    options = capsys.readouterr().out.split()
    for name in ("--coordinator-address", "--num-processes", "--process-id"):
        assert name in str(error.value).replace(",", "").split()
        assert name in options


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"coordinator_address": "node1"}, "host:port"),
        ({"coordinator_address": "node1:x"}, "host:port"),
        ({"coordinator_address": "node1:70000"}, "host:port"),
        ({"coordinator_address": "h:1", "num_processes": 0, "process_id": 0}, "--num-processes"),
        ({"coordinator_address": "h:1", "num_processes": 2, "process_id": -1}, "--process-id"),
        ({"coordinator_address": "h:1", "num_processes": 2, "process_id": 0, "cluster": "none"}, "leave one"),
        ({"coordinator_address": "h:1", "num_processes": 2, "process_id": 0, "cluster": "gke"}, "leave one"),
        ({"join_timeout_seconds": 0}, "--join-timeout-seconds"),
        ({"heartbeat_timeout_seconds": 1}, "--heartbeat-timeout-seconds"),
    ],
)
def test_options_that_make_no_sense_are_named(given, word):
    with pytest.raises(UserError, match=word):
        DistributedConfig(**given)
