"""Checks a Volcano Job without a cluster: every field must exist and have the right type, as the API server would say.

Of pods the truth is in the Kubernetes client, whose classes are generated from Kubernetes' own API description and list
each field with its type; TorchX needs it anyway to write a manifest. Its parser ignores unknown fields, and an API
server that is not told to be strict drops them. Of Volcano's Job the fields are stated here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

LIST = re.compile(r"list\[(.+)\]", re.IGNORECASE)
DICT = re.compile(r"dict\[str, ?(.+)\]", re.IGNORECASE)
QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|[KMGTPE]i?)?")
PLAIN_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "bool": bool,
    "datetime": str,
    "object": object,
}
# The client knows these as plain text.
CHOICES: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("V1PodSpec", "restartPolicy"): ("Always", "OnFailure", "Never"),
    ("V1PodSpec", "dnsPolicy"): ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"),
    ("V1Container", "imagePullPolicy"): ("Always", "IfNotPresent", "Never"),
    ("V1ContainerPort", "protocol"): ("TCP", "UDP", "SCTP"),
    ("V1EmptyDirVolumeSource", "medium"): ("", "Memory", "HugePages"),
    ("V1HostPathVolumeSource", "type"): (
        *("", "DirectoryOrCreate", "Directory", "FileOrCreate", "File"),
        *("Socket", "CharDevice", "BlockDevice"),
    ),
    ("V1Toleration", "operator"): ("Exists", "Equal"),
    ("V1Toleration", "effect"): ("NoSchedule", "PreferNoSchedule", "NoExecute"),
}
QUANTITIES = {
    ("V1ResourceRequirements", "limits"),
    ("V1ResourceRequirements", "requests"),
    ("V1EmptyDirVolumeSource", "sizeLimit"),
}
# A pod's name is its host's, too: <job>-<task>-<number>.
MAX_POD_NAME = 63

LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
# The value of a label, and the last part of its name.
WORD = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?", re.ASCII)
DOMAIN = r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*"
# Those that Volcano's admission takes from users, of more that it has.
Event = Literal["*", "PodPending", "PodFailed", "PodEvicted", "Unknown", "TaskCompleted", "TaskFailed", "JobUpdated"]
Action = Literal[
    "AbortJob",
    "RestartJob",
    "RestartTask",
    "RestartPod",
    "RestartPartition",
    "TerminateJob",
    "CompleteJob",
    "ResumeJob",
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class _Policy(_Strict):
    action: Action
    event: Event | None = None
    events: list[Event] | None = None
    exit_code: int | None = Field(None, ge=1, le=255)
    timeout: str | None = None


class _Task(_Strict):
    name: str = Field(pattern=LABEL, max_length=63)
    replicas: int = Field(ge=0)
    template: dict[str, Any]
    min_available: int | None = Field(None, ge=0)
    max_retry: int | None = Field(None, ge=0)
    policies: list[_Policy] = []
    topology_policy: Literal["none", "best-effort", "restricted", "single-numa-node"] | None = None


class _JobSpec(_Strict):
    tasks: list[_Task] = Field(min_length=1)
    scheduler_name: str = Field(max_length=63)
    queue: str = Field(pattern=LABEL, max_length=253)
    max_retry: int | None = Field(None, ge=0)
    min_available: int | None = Field(None, ge=0)
    min_success: int | None = Field(None, ge=1)
    plugins: dict[str, list[str]] = {}
    policies: list[_Policy] = []
    priority_class_name: str | None = None
    ttl_seconds_after_finished: int | None = Field(None, ge=0)


class _Metadata(_Strict):
    name: str = Field(pattern=LABEL, max_length=63)
    namespace: str | None = Field(None, pattern=LABEL, max_length=63)
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class _Job(_Strict):
    api_version: Literal["batch.volcano.sh/v1alpha1"]
    kind: Literal["Job"]
    metadata: _Metadata
    spec: _JobSpec


def find_problems(manifest: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with a Volcano Job, each problem with its place in the manifest."""
    try:
        job = _Job.model_validate(manifest)
    except ValidationError as error:
        return [f"{'.'.join(map(str, problem['loc']))}: {_reason(problem)}" for problem in error.errors()]
    problems = _wrong_labels(manifest["metadata"], "metadata")
    for index, task in enumerate(job.spec.tasks):
        place = f"spec.tasks.{index}"
        problems += _problems_of(task.template, "V1PodTemplateSpec", f"{place}.template")
        problems += _unmounted(task.template, f"{place}.template") if not problems else []
        pod_name = f"{job.metadata.name}-{task.name}-{max(task.replicas - 1, 0)}"
        if len(pod_name) > MAX_POD_NAME:
            problems.append(
                f"{place}.name: the pod's name {pod_name} has {len(pod_name)} letters, {MAX_POD_NAME} are allowed"
            )
        problems += _wrong_labels(task.template.get("metadata") or {}, f"{place}.template.metadata")
        problems += _contradictions(task.policies, f"{place}.policies")
    return problems + _contradictions(job.spec.policies, "spec.policies")


def _wrong_labels(metadata: Mapping[str, Any], place: str) -> list[str]:
    """What Kubernetes does not take as a label, or as the name of a label or annotation."""
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    problems = []
    for kind, names in (("labels", labels), ("annotations", annotations)):
        for name in names:
            domain, slash, own = name.rpartition("/")
            if not WORD.fullmatch(own) or (slash and not re.fullmatch(DOMAIN, domain)):
                problems.append(f"{place}.{kind}: {name!r} is no name; as in app.example.org/part, or part")
    for name, value in labels.items():
        if value and not WORD.fullmatch(str(value)):
            problems.append(
                f"{place}.labels.{name}: {value!r} is no label: up to 63 letters, digits, - _ and ., a letter or digit "
                "at both ends"
            )
    return problems


def _contradictions(policies: list[_Policy], place: str) -> list[str]:
    """What Volcano's admission refuses of policies, besides wrong fields."""
    problems = []
    causes: list[str | int] = []
    for policy in policies:
        events = [*(policy.events or []), *([policy.event] if policy.event else [])]
        if events and policy.exit_code is not None:
            problems.append(f"{place}: exitCode and event exclude each other")
        if not events and policy.exit_code is None:
            problems.append(f"{place}: a policy needs an event or an exitCode")
        causes += events or ([policy.exit_code] if policy.exit_code is not None else [])
    twice = sorted({str(cause) for cause in causes if causes.count(cause) > 1})
    return problems + [f"{place}: {cause} stands in two policies" for cause in twice]


def _reason(problem: Any) -> str:
    if problem["type"] == "extra_forbidden":
        return "there is no such field"
    return f"{problem['msg']}; found {problem['input']!r}" if problem["type"] != "missing" else "is missing"


def _problems_of(value: Any, type_name: str, place: str) -> list[str]:
    """Hold a value against the name of its type in the Kubernetes client."""
    if found := LIST.fullmatch(type_name):
        if not isinstance(value, list):
            return [f"{place}: a list is needed; found {value!r}"]
        return [p for index, item in enumerate(value) for p in _problems_of(item, found[1], f"{place}.{index}")]
    if found := DICT.fullmatch(type_name):
        if not isinstance(value, dict):
            return [f"{place}: a mapping is needed; found {value!r}"]
        return [p for key, item in value.items() for p in _problems_of(item, found[1], f"{place}.{key}")]
    if type_name in PLAIN_TYPES:
        is_right = isinstance(value, PLAIN_TYPES[type_name]) and (type_name == "bool" or not isinstance(value, bool))
        return [] if is_right else [f"{place}: {type_name} is needed; found {value!r}"]
    return _problems_of_object(value, type_name, place)


def _problems_of_object(value: Any, type_name: str, place: str) -> list[str]:
    from kubernetes.client import models

    known: Any = getattr(models, type_name)
    if not isinstance(value, dict):
        return [f"{place}: a mapping is needed; found {value!r}"]
    attributes = {written: attribute for attribute, written in known.attribute_map.items()}
    problems = []
    for field, item in value.items():
        if field not in attributes:
            problems.append(f"{place}.{field}: there is no such field")
            continue
        problems += _problems_of(item, known.openapi_types[attributes[field]], f"{place}.{field}")
        problems += _problems_of_text(item, (type_name, field), f"{place}.{field}")
    return problems or _missing(value, known, attributes, place)


def _problems_of_text(item: Any, field: tuple[str, str], place: str) -> list[str]:
    """Hold text against what Kubernetes takes in this field, where the client does not know."""
    if field in CHOICES and item not in CHOICES[field]:
        return [f"{place}: one of {', '.join(filter(None, CHOICES[field]))} is needed; found {item!r}"]
    if field not in QUANTITIES:
        return []
    amounts = item.items() if isinstance(item, dict) else [("", item)]
    return [
        f"{place}{'.' * bool(key)}{key}: a quantity as 500m, 4 or 64Gi is needed; found {amount!r}"
        for key, amount in amounts
        if isinstance(amount, str) and not QUANTITY.fullmatch(amount)
    ]


def _missing(value: Mapping[str, Any], known: Any, attributes: Mapping[str, str], place: str) -> list[str]:
    """Let the client say which field it wants; a nested object stands for itself."""
    try:
        known(**{attributes[field]: item if not isinstance(item, dict | list) else [] for field, item in value.items()})
    except ValueError as error:
        wanted = re.search(r"Invalid value for `(\w+)`, must not be `None`", str(error))
        if wanted:
            return [f"{place}.{known.attribute_map[wanted[1]]}: is missing"]
    return []


def _unmounted(template: Mapping[str, Any], place: str) -> list[str]:
    spec = template.get("spec") or {}
    volumes = {volume["name"] for volume in spec.get("volumes") or []}
    return [
        f"{place}.spec.containers.{index}.volumeMounts: there is no volume {mount['name']}"
        for index, container in enumerate(spec.get("containers") or [])
        for mount in container.get("volumeMounts") or []
        if mount["name"] not in volumes
    ]
