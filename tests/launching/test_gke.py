"""Manifests for GKE: JobSet's schema, the counts of nodes, and what follows from each way that a pod ends."""

from __future__ import annotations

import copy
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sealion_jax.distributed import DistributedConfig
from sealion_jax.distributed.finding import find_cluster
from sealion_jax.errors import UserError
from sealion_jax.planning.topology import parse_topology
from sealion_jax.train import OPTIONS
from tests.launching.job_set_schema import check_job_set

FOLDER = Path(__file__).parents[2] / "launch" / "gke"
PODS = (
    "v5p:4x4x4",
    "v5e:16x16",
    "v6e:2x4",
    "tpu7x:4x4x8",
    "v4:2x2x1",
    "h100:1x8",
    "h100:4x8",
    "h200:2x8",
    "b200:8x8",
)
EVERYTHING = (
    *("--service-account", "trainer", "--namespace", "research", "--queue", "pods", "--spot"),
    *("--node-selector", "cloud.google.com/reservation-name=ours", "--env", "A=1", "B=$(A) = 2"),
    *("--claims", "stores=/mnt/stores", "--max-restarts", "3", "--grace-seconds", "60"),
)


@pytest.fixture(scope="module")
def render():
    """The script's module, which imports its neighbour as it does when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import render  # pyright: ignore[reportMissingImports]

        yield render


@pytest.fixture
def manifest(render, capsys):
    """The manifest of a topology, with further options before and after the `--`."""

    def make(topology: str, *options: str, train: tuple[str, ...] = ()) -> dict:
        words = ["--name", "run1", "--image", "here/image:1", "--run-dir", "gs://bucket/run1"]
        render.main([*words, "--topology", topology, *options, "--", "cpt_27b", *train])
        return yaml.safe_load(capsys.readouterr().out)

    return make


def _job(manifest: dict) -> dict:
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]


def _pod(manifest: dict) -> dict:
    return _job(manifest)["template"]["spec"]


def _container(manifest: dict) -> dict:
    return _pod(manifest)["containers"][0]


def test_the_command_of_the_docs_prints_yaml():
    command = [
        sys.executable,
        FOLDER / "render.py",
        "--name",
        "run1",
        "--image",
        "IMAGE",
        "--topology",
        "v5p:4x4x4",
    ]
    command += ["--run-dir", "gs://bucket/run1", "--", "cpt_27b"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert yaml.safe_load(done.stdout)["kind"] == "JobSet"
    assert done.stderr == ""


@pytest.mark.parametrize("topology", PODS)
def test_manifests_are_job_sets(manifest, topology):
    check_job_set(manifest(topology))
    check_job_set(manifest(topology, *EVERYTHING))
    if topology.startswith(("v5p", "tpu7x")):
        check_job_set(manifest(topology, "--slices", "2", train=("--mesh.data", "2")))


BROKEN = {
    "misspelt": lambda m: m["spec"].update(failurePolcy={}),
    "misspelt below": lambda m: _pod(m).update(terminationGracePeriodSecond=60),
    "misspelt in a rule": lambda m: m["spec"]["failurePolicy"]["rules"][0].update(onJobFailureReason=["A"]),
    "a number for a text": lambda m: _container(m)["env"][0].update(value=1),
    "a text for a number": lambda m: _job(m).update(completions="16"),
    "a text for a list": lambda m: _container(m).update(command="python"),
    "no name": lambda m: _container(m).pop("name"),
    "no status": lambda m: _job(m)["podFailurePolicy"]["rules"][2]["onPodConditions"][0].pop("status"),
    "an unknown action": lambda m: m["spec"]["failurePolicy"]["rules"][0].update(action="FailJob"),
    "an unknown action of a pod": lambda m: _job(m)["podFailurePolicy"]["rules"][0].update(action="Fail"),
    "an unknown policy": lambda m: _pod(m).update(restartPolicy="never"),
    "an unknown effect": lambda m: _pod(m)["tolerations"][0].update(effect="NoScheduling"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_manifest_is_told_from_a_job_set(manifest, broken):
    good = manifest("h200:2x8", *EVERYTHING)
    check_job_set(good)
    bad = copy.deepcopy(good)
    BROKEN[broken](bad)
    with pytest.raises(ValueError, match=r"\w"):
        check_job_set(bad)


@pytest.mark.parametrize(
    ("topology", "slices", "nodes", "chips", "label"),
    [
        # docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus: nodes of each machine and topology
        ("v5p:4x4x4", 1, 16, 4, "tpu-v5p-slice"),
        ("v5p:4x4x4", 2, 16, 4, "tpu-v5p-slice"),
        ("v5p:2x2x1", 1, 1, 4, "tpu-v5p-slice"),
        ("v4:2x2x2", 1, 2, 4, "tpu-v4-podslice"),
        ("v5e:1x1", 1, 1, 1, "tpu-v5-lite-podslice"),
        ("v5e:2x4", 1, 1, 8, "tpu-v5-lite-podslice"),
        ("v5e:16x16", 1, 64, 4, "tpu-v5-lite-podslice"),
        ("v6e:4x4", 1, 4, 4, "tpu-v6e-slice"),
        ("tpu7x:4x4x8", 1, 32, 4, "tpu7x"),
    ],
)
def test_a_slice_has_its_nodes(manifest, topology, slices, nodes, chips, label):
    made = manifest(topology, "--slices", str(slices), train=("--mesh.data", str(slices)))
    assert made["spec"]["replicatedJobs"][0]["replicas"] == slices
    assert (_job(made)["parallelism"], _job(made)["completions"]) == (nodes, nodes)
    assert _container(made)["resources"]["limits"] == {"google.com/tpu": str(chips)}
    assert _pod(made)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": topology.split(":")[1],
    }
    assert nodes * chips * slices == parse_topology(topology, num_slices=slices).num_chips
    exclusive = made["metadata"].get("annotations", {})
    assert (exclusive != {}) == (nodes > 1)


def test_a_slice_of_eight_may_be_two_nodes(manifest):
    made = manifest("v6e:2x4", "--chips-per-node", "4")
    assert (_job(made)["parallelism"], _container(made)["resources"]["limits"]["google.com/tpu"]) == (2, "4")


def test_gpu_processes_find_the_first_pod_by_its_name(manifest):
    made = manifest("h100:4x8")
    words = _container(made)["command"]
    named = dict(itertools.pairwise(words))
    # <jobset>-<replicated job>-<job index>-<pod index>.<subdomain>, which is the JobSet's name
    assert named["--coordinator-address"].split(":")[0] == "run1-train-0-0.run1"
    assert (named["--num-processes"], named["--process-id"]) == ("4", "$(JOB_COMPLETION_INDEX)")
    assert _job(made)["completionMode"] == "Indexed"
    assert "--process-id" not in _container(manifest("h100:1x8"))["command"]


@pytest.mark.parametrize(
    ("topology", "cluster", "devices"),
    [("v5p:4x4x4", "gke", 4), ("tpu7x:4x4x4", "gke", 8), ("h100:1x8", "none", 8)],
)
def test_training_is_told_where_it_is_and_takes_these_options(manifest, topology, cluster, devices):
    words = _container(manifest(topology, "--join-seconds", "60"))["command"]
    config = DistributedConfig(
        cluster=words[words.index("--cluster") + 1],
        join_timeout_seconds=int(words[words.index("--join-timeout-seconds") + 1]),
        expect_local_devices=int(words[words.index("--expect-local-devices") + 1]),
    )
    assert (config.cluster, config.join_timeout_seconds) == (cluster, 60)
    assert config.expect_local_devices == devices
    assert {word[2:] for word in words if word.startswith("--")} <= {"run-dir", *OPTIONS}


@pytest.mark.parametrize(
    ("topology", "adapters"), [("h100:4x8", 0), ("h200:1x8", 0), ("h200:2x8", 8), ("b200:2x8", 8)]
)
def test_nodes_with_rdma_get_all_adapters_when_there_are_several(manifest, topology, adapters):
    made = manifest(topology)
    annotations = _job(made)["template"].get("metadata", {}).get("annotations", {})
    networks = yaml.safe_load(annotations.get("networking.gke.io/interfaces", "[]"))
    assert sum(one["network"].startswith("rdma-") for one in networks) == adapters
    assert any("set_nccl_env.sh" in word for word in _container(made)["command"]) == (adapters > 0)


def _expanded(word: str, env: dict[str, str]) -> str:
    """As Kubernetes' documentation of a container's command has it: $$ is $, $(NAME) a known variable."""
    return re.sub(
        r"\$(\$|\(([^)]*)\))",
        lambda found: "$" if found[1] == "$" else env.get(found[2], found[0]),
        word,
    )


@pytest.mark.parametrize("topology", ["v5p:4x4x4", "h100:4x8", "h200:4x8"])
def test_words_reach_training_as_they_were_given(manifest, topology):
    given = ["--name", 'it\'s $HOME $(JOB_COMPLETION_INDEX) $$ "two"  words']
    words = _container(manifest(topology, train=tuple(given)))["command"]
    words = [_expanded(word, {"JOB_COMPLETION_INDEX": "3"}) for word in words]
    assert words[:2] == ["bash", "-c"]
    # The shell's part runs, without the settings that are on the nodes.
    script = words[2].removeprefix("source /usr/local/gib/scripts/set_nccl_env.sh || exit\n")
    assert (script == words[2]) == (topology != "h200:4x8")
    tell = [sys.executable, "-c", "import sys; print('\\0'.join(sys.argv[1:]), end='')", *words[4:]]
    done = subprocess.run(
        ["bash", "-c", script, "bash", *tell], capture_output=True, text=True, timeout=30, check=True
    )
    words = done.stdout.split("\0")
    assert words[:6] == ["python", "-m", "sealion_jax.train", "cpt_27b", *given]
    assert words[6:8] == ["--run-dir", "gs://bucket/run1"]
    if topology != "v5p:4x4x4":
        assert words[words.index("--process-id") :][:2] == ["--process-id", "3"]


def _follows(manifest: dict, *, exit_code: int, disrupted: bool = False) -> str:
    """What the JobSet does when a pod ended like this.

    By the rules of Jobs (kubernetes.io/docs/concepts/workloads/controllers/job/#pod-failure-policy), whose
    messages are "Container <name> for pod <pod> failed with exit code <code> matching FailJob rule at index
    <n>" and "Pod <pod> has condition <type> matching FailJob rule at index <n>", and of JobSet's failure
    policy: the first rule that matches, and RestartJobSet where none does.
    """
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(_job(manifest)["podFailurePolicy"]["rules"]):
        codes = rule.get("onExitCodes")
        conditions = rule.get("onPodConditions", [])
        if (codes and exit_code in codes["values"]) or (
            disrupted and any(one["type"] == "DisruptionTarget" for one in conditions)
        ):
            assert rule["action"] == "FailJob"
            assert not codes or codes["containerName"] == _container(manifest)["name"]
            reason, message = "PodFailurePolicy", f"Pod ns/p failed matching FailJob rule at index {index}"
            break
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        patterns = rule["onJobFailureMessagePatterns"]
        if reason in rule["onJobFailureReasons"] and any(re.search(one, message) for one in patterns):
            return rule["action"]
    return "RestartJobSet"


def test_what_follows_from_each_end_of_a_pod(manifest):
    made = manifest("v5p:4x4x4")
    assert _job(made)["backoffLimit"] == 0
    assert _pod(made)["restartPolicy"] == "Never"
    assert _follows(made, exit_code=2) == "FailJobSet"
    assert _follows(made, exit_code=2, disrupted=True) == "FailJobSet"
    assert _follows(made, exit_code=75) == "RestartJobSetAndIgnoreMaxRestarts"
    assert _follows(made, exit_code=143, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    assert [_follows(made, exit_code=code) for code in (1, 134, 137)] == ["RestartJobSet"] * 3
    assert made["spec"]["failurePolicy"]["maxRestarts"] == 20


def _shell(manifest: dict, attempt: int, *command: str) -> subprocess.Popen[str]:
    """What the container runs, with another command in training's place."""
    words = [_expanded(word, {}) for word in _container(manifest)["command"]]
    assert words[3:7] == ["bash", "python", "-m", "sealion_jax.train"]
    env = {**os.environ, "JOBSET_RESTART_ATTEMPT": str(attempt)}
    return subprocess.Popen([*words[:4], *command], env=env, stdout=subprocess.PIPE, text=True)


def test_what_is_refused_after_a_restart_is_a_failure_like_others(manifest):
    made = manifest("v5p:4x4x4")
    for attempt, code, follows in (
        (0, 2, "FailJobSet"),
        (1, 2, "RestartJobSet"),
        (11, 2, "RestartJobSet"),
        (1, 75, "RestartJobSetAndIgnoreMaxRestarts"),
        (1, 137, "RestartJobSet"),
    ):
        ended = _shell(made, attempt, "bash", "-c", f"exit {code}").wait(timeout=30)
        assert _follows(made, exit_code=ended) == follows
    assert [_shell(made, n, "true").wait(timeout=30) for n in (0, 1)] == [0, 0]


def test_training_in_a_pod_hears_sigterm_and_has_its_time_to_save(manifest):
    train = "trap 'sleep 0.3; echo saved; exit 75' TERM; echo started; sleep 30 & wait"
    shell = _shell(manifest("v5p:4x4x4"), 1, "bash", "-c", train)
    assert shell.stdout is not None
    assert shell.stdout.readline() == "started\n"
    shell.terminate()
    assert (shell.stdout.readline(), shell.wait(timeout=20)) == ("saved\n", 75)


def test_claims_may_be_called_like_mounts_of_ours(manifest):
    pod = _pod(manifest("h200:2x8", "--claims", "shared-memory=/x", "gib=/y", "my.claim=/z/"))
    names = [volume["name"] for volume in pod["volumes"]]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch("[a-z0-9-]+", name) for name in names)


def test_options_reach_the_manifest(manifest):
    made = manifest("h100:2x8", *EVERYTHING, "--accelerator", "nvidia-h100-mega-80gb")
    pod, container = _pod(made), _container(made)
    assert made["metadata"] == {
        "name": "run1",
        "namespace": "research",
        "labels": {"kueue.x-k8s.io/queue-name": "pods"},
    }
    assert made["spec"]["failurePolicy"]["maxRestarts"] == 3
    assert (pod["terminationGracePeriodSeconds"], pod["serviceAccountName"]) == (60, "trainer")
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-accelerator": "nvidia-h100-mega-80gb",
        "cloud.google.com/reservation-name": "ours",
        "cloud.google.com/gke-spot": "true",
    }
    assert {one["key"] for one in pod["tolerations"]} == {"nvidia.com/gpu", "cloud.google.com/gke-spot"}
    env = {one["name"]: one.get("value") for one in container["env"]}
    assert (env["A"], env["B"]) == ("1", "$(A) = 2")
    assert {"name": "claim-0", "mountPath": "/mnt/stores"} in container["volumeMounts"]
    assert {"name": "claim-0", "persistentVolumeClaim": {"claimName": "stores"}} in pod["volumes"]
    assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}


def test_training_knows_the_slices_and_the_start_that_its_pods_are(manifest):
    """With what GKE sets besides: cloud.google.com/kubernetes-engine/docs/concepts/tpus."""
    made = manifest("v5p:4x4x4", "--slices", "2", train=("--mesh.data", "2"))
    annotations = {"jobset-uid": "0a1b", "restart-attempt": "3"}
    env = {
        "TPU_WORKER_ID": "5",
        "TPU_WORKER_HOSTNAMES": ",".join(f"run1-train-1-{n}.run1" for n in range(16)),
        "MEGASCALE_COORDINATOR_ADDRESS": "run1-train-0-0.run1",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1",
    }
    for one in _container(made)["env"]:
        if "valueFrom" in one:
            path = one["valueFrom"]["fieldRef"]["fieldPath"]
            found = re.fullmatch(r"metadata\.annotations\['jobset\.sigs\.k8s\.io/([-a-z]+)'\]", path)
            assert found is not None
            env[one["name"]] = annotations[found[1]]
        else:
            env[one["name"]] = _expanded(one["value"], env)  # variables that stand before it are known
    cluster = find_cluster(env, DistributedConfig(cluster="gke"))
    assert cluster is not None
    assert (cluster.num_processes, cluster.process_id) == (32, 21)
    assert (cluster.job_id, cluster.restarts) == ("run1/0a1b", 3)
    assert cluster.coordinator_address.startswith("run1-train-0-0.run1:")


def _options(**changed: str) -> list[str]:
    values = {"name": "run1", "image": "i", "run-dir": "gs://b/r", "topology": "v5p:4x4x4"} | changed
    return [word for name, value in values.items() for word in (f"--{name}", value)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (_options(name="Run_1"), "lower-case"),
        ([*_options(name="a" * 50), "--", "cpt_27b"], "too long by 4"),
        (_options(topology="v5p:4x4"), "3 directions"),
        (_options(topology="v5p:4x8x4"), "smallest first"),
        (_options(topology="v6e:4x16"), "GKE has slices of"),
        (_options(**{"topology": "v6e:2x4", "chips-per-node": "2"}), "4 or 8 chips"),
        (_options(**{"topology": "h100:2x8", "chips-per-node": "4"}), "for TPUs"),
        (_options(topology="v5p:2x2x1", slices="2"), "take a larger slice"),
        (_options(**{"run-dir": "/runs/first"}), "lost with its pod"),
        ([*_options(env="A"), "--", "cpt_27b"], "expected key=value"),
        (_options(namespace="Bad Name"), "Kubernetes allows no such name"),
        (_options(queue=""), "Kubernetes allows no such name"),
        (_options(image=""), "podman push"),
        (_options(slices="0"), "--slices, .* at least 1"),
        (_options(topology="h100:2x8", slices="2"), "--slices 2 is for TPUs"),
        (_options(topology="h100:4x16"), "8 GPUs at most; give more nodes, as in h100:8x8"),
        (_options(topology="h200:2x4"), "take whole nodes, as in h200:2x8"),
        (_options(env="1 A=2"), "a variable's name has"),
        (_options(env="JOBSET_NAME=x"), "leave it out"),
        ([*_options(), "--env", "A=1", "A=2"], "A is given twice, as 1 and as 2"),
        (_options(**{"run-dir": "gs://"}), "expected gs://BUCKET/FOLDER"),
        (_options(**{"run-dir": "/mnt/../tmp/x", "claims": "c=/mnt"}), "lost with its pod"),
        (_options(claims="My_Claim.x=/mnt/x"), "no name of a claim"),
        (_options(claims="c=mnt"), "an absolute path"),
        (_options(claims="c=/mnt/../x"), "an absolute path"),
        (_options(claims="c=/dev/shm/"), "something else is mounted there"),
        ([*_options(), "--claims", "a=/x", "b=/x/"], "something else is mounted there"),
        (_options(**{"node-selector": "a b=c"}), "no such label"),
        (
            [*_options(**{"node-selector": "cloud.google.com/gke-tpu-topology=4x4"}), "--", "cpt_27b"],
            "--topology",
        ),
        ([*_options(), "--", "cpt_27b", "--run-dir", "gs://c"], "before the --"),
        ([*_options(), "--", "cpt_27b", "--process-id=1"], "set by render"),
        ([*_options(), "--", "cpt_27b", "--stpes", "5"], "did you mean --steps"),
        ([*_options(slices="3"), "--", "cpt_27b"], "multiple of the slices"),
        ([*_options(), "--", "cpt_27b", "--mesh.tensor", "5"], "does not fit 64 devices"),
        ([*_options(), "--", "cpt_tiny"], "global batch 8 must be a multiple of 64"),
    ],
)
def test_mistakes_are_told_before_a_pod_is_asked_for(render, capsys, words, message):
    with pytest.raises(UserError, match=message):
        render.main(words)
    assert capsys.readouterr().out == ""


def test_a_recipe_that_only_the_image_has_is_not_checked(render, capsys):
    render.main([*_options(), "--", "/recipes/ours.py", "--steps", "5"])
    told = capsys.readouterr()
    assert "was not checked" in told.err
    assert "/recipes/ours.py" in _container(yaml.safe_load(told.out))["command"]


def test_a_recipe_of_this_folder_is_checked_and_where_pods_look_for_it_is_told(
    render, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    recipe = Path("ours.py")
    recipe.write_text("from sealion_configs.cpt_27b import recipe\n")
    render.main([*_options(), "--", "ours.py"])
    assert "pods read the image's, below its working directory" in capsys.readouterr().err
    with pytest.raises(UserError, match="did you mean --steps"):
        render.main([*_options(), "--", "ours.py", "--stpes", "5"])
