"""Manifests for Volcano, made by the real `torchx` command and by our own scheduler, held against strict schemas."""

from __future__ import annotations

import base64
import copy
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from torchx import specs
from torchx.runner import Runner

from papilio.launch import components
from papilio.launch.schedulers.errors import SchedulerError
from papilio.launch.schedulers.kubernetes.manifest_check import find_problems
from papilio.launch.schedulers.runner import make_runner
from tests.support.torchx_command import run_torchx

Manifest = dict[str, Any]
SETTINGS = {"queue": "default", "validate_spec": False}
MOUNTS = [
    *("type=volume", "src=datasets", "dst=/data", "readonly"),
    *("type=bind", "src=/mnt/runs", "dst=/runs"),
]
TEMPLATE = ("spec", "tasks", 0, "template")
CONTAINER = (*TEMPLATE, "spec", "containers", 0)


@pytest.fixture(scope="module")
def made_by_torchx() -> Manifest:
    """What a user of plain TorchX sends."""
    done = run_torchx(
        *("run", "--dryrun", "--workspace", "", "-s", "kubernetes", "-cfg", "queue=default,validate_spec=False"),
        *("papilio.train", "--recipe", "quickstart", "--nnodes", "2", "--host", "dgx_h100", "--image", "papilio:1"),
        *("--env", "NCCL_SOCKET_IFNAME=eth0,eth1", "--mounts", ",".join(MOUNTS), "--max_retries", "2"),
    )
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout.partition("=== SCHEDULER REQUEST ===")[2])


@pytest.fixture(scope="module")
def made_by_us() -> Manifest:
    with make_runner() as runner:
        return dry_run(runner, image="papilio:1")


def dry_run(runner: Runner, **arguments: Any) -> Manifest:
    app = components.train(recipe="quickstart", nnodes="2", **arguments)
    return yaml.safe_load(str(runner.dryrun(app, "kubernetes", cfg=SETTINGS).request))


def at(manifest: Any, path: tuple[str | int, ...]) -> Any:
    for step in path:
        manifest = manifest[step]
    return manifest


def test_the_manifest_of_plain_torchx_has_what_a_torchrec_job_needs(made_by_torchx: Manifest) -> None:
    assert find_problems(made_by_torchx) == []
    assert [task["name"] for task in at(made_by_torchx, ("spec", "tasks"))] == ["train-0", "train-1"]
    container = at(made_by_torchx, CONTAINER)
    assert container["resources"]["limits"] == {"cpu": "112000m", "memory": "1887436M", "nvidia.com/gpu": "8"}
    assert {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]} == {
        "/dev/shm": "dshm",
        "/data": "mount-0",
        "/runs": "mount-1",
    }
    assert at(made_by_torchx, (*TEMPLATE, "spec", "volumes")) == [
        {"name": "dshm", "emptyDir": {"medium": "Memory", "sizeLimit": "943718M"}},
        {"name": "mount-0", "persistentVolumeClaim": {"claimName": "datasets"}},
        {"name": "mount-1", "hostPath": {"path": "/mnt/runs"}},
    ]
    # 25 s to save, and 10 s for the agents.
    assert at(made_by_torchx, (*TEMPLATE, "spec", "terminationGracePeriodSeconds")) == 35
    assert "--env=NCCL_SOCKET_IFNAME=eth0,eth1" in container["command"]
    assert container["command"][0] == "python3"
    assert at(made_by_torchx, ("spec", "maxRetry")) == 2


def test_the_hosts_find_the_first_of_them(made_by_torchx: Manifest) -> None:
    first, second = (task["template"]["spec"]["containers"][0] for task in at(made_by_torchx, ("spec", "tasks")))
    assert "--head-node-in=TORCHX_RANK0_HOST" in first["command"]
    assert {"name": "TORCHX_RANK0_HOST", "value": "localhost"} in first["env"]
    # Volcano's env plugin sets it: VC_<task>_HOSTS.
    assert "--head-node-in=VC_TRAIN_0_HOSTS" in second["command"]
    assert "env" in at(made_by_torchx, ("spec", "plugins"))


def test_our_scheduler_resumes_what_was_saved_and_ends_what_would_go_wrong_again(made_by_us: Manifest) -> None:
    for task in at(made_by_us, ("spec", "tasks")):
        assert task["policies"] == [
            {"exitCode": 78, "action": "TerminateJob"},
            {"exitCode": 75, "action": "RestartJob"},
            {"event": "PodEvicted", "action": "RestartJob"},
        ]
    with make_runner() as runner:
        retried = dry_run(runner, image="papilio:1", max_retries=3)
    # Volcano takes the first that fits: a mistake that would be made again is no failure to try again.
    assert retried["spec"]["tasks"][0]["policies"][-1] == {"event": "PodFailed", "action": "RestartJob"}
    # Volcano gives up when its count of restarts reaches maxRetry: three restarts, and ten where only resumes restart.
    assert (retried["spec"]["maxRetry"], made_by_us["spec"]["maxRetry"]) == (4, 11)


def test_our_scheduler_refuses_a_job_without_an_image() -> None:
    with make_runner() as runner, pytest.raises(SchedulerError, match="names no image: give --image REGISTRY/NAME:TAG"):
        dry_run(runner)


def test_our_scheduler_dry_runs_without_settings_and_submits_to_a_cluster_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    app = components.train(recipe="quickstart", image="papilio:1")
    with make_runner() as runner:
        info = runner.dryrun(app, "kubernetes")
        assert yaml.safe_load(str(info.request))["spec"]["queue"] == "default"
        with pytest.raises(SchedulerError, match="no Kubernetes cluster is configured here: set KUBECONFIG"):
            runner.schedule(info)


class Refusing(BaseHTTPRequestHandler):
    """A cluster that answers each request with the status and message of its class."""

    answer = (403, "jobs.batch.volcano.sh is forbidden")

    def do_POST(self) -> None:
        self.send_response(self.answer[0], "No")
        self.end_headers()
        self.wfile.write(json.dumps({"message": self.answer[1]}).encode())

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, ""), r"does not know you \(No\): log in again"),
        ((403, "not you"), r"forbids it \(not you\): ask for a role that may use jobs\.batch\.volcano\.sh"),
        ((404, "page not found"), r"knows no Volcano jobs .*: install Volcano \(https://volcano\.sh\)"),
        ((500, "full"), "answered 500: full"),
        (None, r"does not answer: .*[Rr]efused; does `kubectl cluster-info` work here\?"),
    ],
)
def test_what_the_cluster_says_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: tuple[int, str] | None, message: str
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        monkeypatch.setattr(Refusing, "answer", answer)
        cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}
        context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
        config = {
            "clusters": [cluster],
            "contexts": [context],
            "users": [{"name": "u", "user": {}}],
            "current-context": "c",
        }
        (tmp_path / "config").write_text(yaml.safe_dump(config))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "config"))
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        with make_runner() as runner:
            info = runner.dryrun(components.train(recipe="quickstart", image="papilio:1"), "kubernetes")
            if answer is None:
                server.shutdown()
                server.server_close()
            with pytest.raises(SchedulerError, match=f"the Kubernetes cluster at http://127.0.0.1:{port} {message}"):
                runner.schedule(info)
        server.shutdown()


def test_without_the_client_its_absence_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with make_runner() as runner, pytest.raises(SchedulerError, match="client is not installed here: pip install"):
        dry_run(runner, image="papilio:1")


def test_our_scheduler_checks_what_it_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "papilio.launch.schedulers.kubernetes.scheduler.find_problems", lambda manifest: ["spec: no", "kind: no"]
    )
    with make_runner() as runner, pytest.raises(SchedulerError, match="the manifest is wrong: spec: no; kind: no"):
        dry_run(runner, image="papilio:1")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a" * 40, "--name a{40}: it has 40 letters, on Kubernetes 38 are allowed here, .*; shorten it"),
        ("übung", "--name 'übung': on Kubernetes a name has letters of English, digits, - and _, .* as in train-2"),
        ("日本", "--name '日本': on Kubernetes"),
        ("2train", "--name '2train': on Kubernetes"),
        ("my job", "--name 'my job': on Kubernetes"),
        ("train-", "--name 'train-': on Kubernetes"),
    ],
)
def test_a_name_that_kubernetes_does_not_take_is_refused(name: str, message: str) -> None:
    with make_runner() as runner, pytest.raises(SchedulerError, match=message):
        dry_run(runner, image="papilio:1", name=name)


@pytest.mark.parametrize("image", ["papilio :1", "pàpilio:1", "a\nb"])
def test_an_image_that_is_none_is_refused(image: str) -> None:
    with make_runner() as runner, pytest.raises(SchedulerError, match="an image is as REGISTRY/NAME:TAG"):
        dry_run(runner, image=image)


def test_the_longest_name_makes_a_manifest() -> None:
    with make_runner() as runner:
        made = dry_run(runner, image="papilio:1", name="A_" + "a" * 36)
    assert find_problems(made) == []


def test_a_dollar_of_anyones_component_reaches_the_pod_as_it_was_written() -> None:
    role = specs.Role(
        "sh", "i", entrypoint="sh", args=["-c", "echo $$(X) $$HOME"], env={"A": "$$(X)$$$$"}, num_replicas=1
    )
    role.resource = specs.Resource(cpu=1, gpu=0, memMB=100)
    with make_runner() as runner:
        made = yaml.safe_load(str(runner.dryrun(specs.AppDef("sh", [role]), "kubernetes", cfg=SETTINGS).request))
    container = at(made, CONTAINER)
    # As the kubelet reads them: $$ is $.
    assert [word.replace("$$", "$") for word in container["command"]] == ["sh", "-c", "echo $(X) $HOME"]
    assert {"name": "A", "value": "$$(X)$$$$"} in container["env"]


def test_files_of_this_machine_travel_with_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    profile = (Path(components.__file__).parents[1] / "sharding/profiles/cpu_host.toml").read_text()
    for name, text in (("small.toml", "name = 'small'\n"), ("mine.toml", profile), ("plan.json", "{}")):
        (tmp_path / name).write_text(text)
    encoded = base64.b64encode(b"name = 'small'\n").decode()
    with make_runner() as runner:

        def words_of(*overrides: str, **arguments: Any) -> list[str]:
            app = components.train(*overrides, image="papilio:1", **arguments)
            made = yaml.safe_load(str(runner.dryrun(app, "kubernetes", cfg=SETTINGS).request))
            return list(at(made, CONTAINER)["command"])

        words = words_of(recipe="small.toml")
        place = words.index("papilio.launch.start")
        assert words[place + 1 : place + 3] == [f"--file=small.toml:{encoded}", "--"]
        assert words[-2:] == ["--recipe", "small.toml"]
        words = words_of("--sharding.plan=plan.json", recipe="small.toml", host="mine.toml", nnodes="2", preflight=True)
        assert [word.split(":")[0] for word in words if word.startswith("--file=")] == [
            "--file=small.toml",
            f"--file={tmp_path}/mine.toml",
            "--file=plan.json",
        ]
        # A bundled recipe, one on a volume and one of the image are where the pod looks for them.
        mounts = ["type=volume", "src=c", f"dst={tmp_path}"]
        for recipe, given in (("quickstart", None), (f"{tmp_path}/small.toml", mounts), ("/image/a.toml", None)):
            assert not any(word.startswith("--file=") for word in words_of(recipe=recipe, mounts=given))
        (tmp_path / "small.toml").write_bytes(b"#" * 300_000)
        with pytest.raises(SchedulerError, match=r"small.toml has 300000 bytes, and 262144 .* \(--mounts\)"):
            words_of(recipe="small.toml")


def rename(path: tuple[str | int, ...], new: str) -> Callable[[Manifest], None]:
    def change(manifest: Manifest) -> None:
        parent = at(manifest, path[:-1])
        parent[new] = parent.pop(path[-1])

    return change


def put(path: tuple[str | int, ...], value: Any) -> Callable[[Manifest], None]:
    def change(manifest: Manifest) -> None:
        at(manifest, path[:-1])[path[-1]] = value

    return change


def drop(path: tuple[str | int, ...]) -> Callable[[Manifest], None]:
    def change(manifest: Manifest) -> None:
        del at(manifest, path[:-1])[path[-1]]

    return change


SPEC = (*TEMPLATE, "spec")
POD = "spec.tasks.0.template.spec"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (rename((*SPEC, "restartPolicy"), "restartpolicy"), f"{POD}.restartpolicy: there is no such field"),
        (rename((*CONTAINER, "volumeMounts"), "mounts"), f"{POD}.containers.0.mounts: there is no such field"),
        (put((*SPEC, "restartPolicy"), "Nope"), f"{POD}.restartPolicy: one of Always, OnFailure, Never is needed"),
        (
            put((*SPEC, "terminationGracePeriodSeconds"), "35"),
            "terminationGracePeriodSeconds: int is needed; found '35'",
        ),
        (put((*SPEC, "hostNetwork"), 1), f"{POD}.hostNetwork: bool is needed; found 1"),
        (put((*SPEC, "containers"), {}), f"{POD}.containers: a list is needed"),
        (put((*SPEC, "volumes", 0), "dshm"), f"{POD}.volumes.0: a mapping is needed; found 'dshm'"),
        (put((*CONTAINER, "env", 0, "value"), 1), f"{POD}.containers.0.env.0.value: str is needed; found 1"),
        (put((*CONTAINER, "ports", 0, "containerPort"), True), "containerPort: int is needed; found True"),
        (put((*CONTAINER, "resources", "limits", "memory"), "64GB"), "limits.memory: a quantity as 500m, 4 or 64Gi"),
        (drop((*CONTAINER, "name")), f"{POD}.containers.0.name: is missing"),
        (drop((*SPEC, "containers")), f"{POD}.containers: is missing"),
        (put((*CONTAINER, "volumeMounts", 0, "name"), "shm"), "containers.0.volumeMounts: there is no volume shm"),
        (put(("spec", "maxRetries"), 3), "spec.maxRetries: there is no such field"),
        (put(("spec", "queue"), None), "spec.queue: Input should be a valid string; found None"),
        (
            put(("spec", "tasks", 0, "replicas"), "1"),
            "spec.tasks.0.replicas: Input should be a valid integer; found '1'",
        ),
        (drop(("spec", "tasks", 0, "template")), "spec.tasks.0.template: is missing"),
        (put(("spec", "tasks", 0, "policies", 0, "action"), "Restart"), "spec.tasks.0.policies.0.action: "),
        (put(("spec", "tasks", 0, "policies", 0, "event"), "PodFailed"), "exitCode and event exclude each other"),
        (put(("spec", "tasks", 0, "policies", 1, "event"), "PodRunning"), "spec.tasks.0.policies.1.event: "),
        (drop(("spec", "tasks", 0, "policies", 0, "exitCode")), "a policy needs an event or an exitCode"),
        (
            put(("spec", "tasks", 0, "policies", 0), {"event": "PodEvicted", "action": "AbortJob"}),
            "spec.tasks.0.policies: PodEvicted stands in two policies",
        ),
        (put(("metadata", "name"), "Train_1"), "metadata.name: String should match pattern"),
        (put(("apiVersion",), "batch/v1"), "apiVersion: "),
        (put((*TEMPLATE, "metadata", "labels", "team"), "a b"), "template.metadata.labels.team: 'a b' is no label"),
        (put((*TEMPLATE, "metadata", "labels", "x"), "a" * 64), "is no label: up to 63 letters"),
        (put((*TEMPLATE, "metadata", "labels", "a b"), "x"), "template.metadata.labels: 'a b' is no name"),
        (put((*TEMPLATE, "metadata", "annotations", "ü/x"), "any\ntext"), "metadata.annotations: 'ü/x' is no name"),
        (put(("metadata", "labels"), {"x": "-"}), "metadata.labels.x: '-' is no label"),
        (put(("metadata", "namespace"), "My_Space"), "metadata.namespace: String should match pattern"),
    ],
)
def test_a_wrong_field_or_type_is_found(made_by_us: Manifest, change: Callable[[Manifest], None], problem: str) -> None:
    assert find_problems(made_by_us) == []
    changed = copy.deepcopy(made_by_us)
    change(changed)
    (found, *_) = find_problems(changed)
    assert problem in found


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"namespace": "Team_A"}, {}, "-cfg namespace='Team_A': on Kubernetes its name has small letters"),
        ({"namespace": "a" * 64}, {}, "63 letters at most"),
        ({"service_account": "x y"}, {}, "-cfg service_account='x y': "),
        ({"priority_class": "$(X)"}, {}, "-cfg priority_class='$(X)': "),
        ({}, {"image": "UPPER/X:1"}, "--image 'UPPER/X:1': an image is as REGISTRY/NAME:TAG"),
        ({}, {"image": "r/x:$(y)"}, "--image 'r/x:$(y)': an image is as"),
        ({}, {"mounts": ["type=volume", "src=My_Claim", "dst=/data"]}, "--mounts src=My_Claim: the name of a volume"),
        ({}, {"mounts": ["type=bind", "src=data", "dst=/data"]}, "--mounts src=data: a folder of the nodes begins"),
        ({}, {"mounts": ["type=volume", "src=a", "dst=data"]}, "--mounts dst=data: a folder of the pods begins"),
        (
            {},
            {"mounts": [*("type=volume", "src=a", "dst=/d"), *("type=volume", "src=b", "dst=/d")]},
            "--mounts dst=/d: two mounts have this place",
        ),
    ],
)
def test_what_the_cluster_would_refuse_is_refused_here(
    settings: dict[str, str], arguments: dict[str, Any], message: str
) -> None:
    arguments = {"image": "registry.example:5000/team/papilio@sha256:0a"} | arguments
    app = components.train(recipe="quickstart", **arguments)
    with make_runner() as runner, pytest.raises(SchedulerError) as raised:
        runner.dryrun(app, "kubernetes", cfg=SETTINGS | settings)
    assert message in str(raised.value)
