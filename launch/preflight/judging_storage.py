"""Can every host write where the run writes, is there room, and is the data whole?"""

from __future__ import annotations

from papilio.launch.preflight.facts import DataFacts
from papilio.launch.preflight.finding import Evidence, Finding, named, or_all_well
from papilio.sharding.reports.figures import size

GIB = 1 << 30
# Metrics, TensorBoard's events, the report, logs.
RUN_FOLDER_BYTES = GIB


def check_folders(evidence: Evidence) -> list[Finding]:
    """Does every host write to the run's folders, and are these the same for all?"""
    problems = [
        Finding("run folder", "FAIL", (evidence.name(index),), found, fix)
        for index, _, facts in evidence.present
        for folder in facts.folders
        if folder.error
        for found, fix in [_split(folder.error, "choose another folder")]
    ]
    paths = [folder.path for folder in evidence.present[0][2].folders]
    for position in range(len(paths)):
        problems += _strangers(evidence, position)
    shared = " and is the same on all hosts" if evidence.num_hosts > 1 else ""
    return or_all_well("run folder", problems, evidence, lambda: f"{' and '.join(paths)} can be written{shared}")


def _strangers(evidence: Evidence, position: int) -> list[Finding]:
    """Name the hosts on which a folder does not show what the others wrote to theirs."""
    wrote = [(index, card, facts.folders[position]) for index, card, facts in evidence.present]
    wrote = [(index, card, folder) for index, card, folder in wrote if not folder.error]
    unseen = {
        evidence.name(index): [evidence.name(other) for other, card, _ in wrote if card.token not in folder.marks]
        for index, _, folder in wrote
    }
    unseen = {host: others for host, others in unseen.items() if others}
    fix = "put it on a file system that all hosts mount: --output.runs_dir=/shared/runs"
    fix += "; or checkpoints on S3: --checkpoint.folder=s3://bucket/prefix"
    if len(unseen) > 2 and all(len(others) == len(wrote) - 1 for others in unseen.values()):
        found = f"{wrote[0][2].path} is another folder on every host"
        return [Finding("run folder", "FAIL", tuple(unseen), found, fix)]
    path = {evidence.name(index): folder.path for index, _, folder in wrote}
    return [
        Finding(
            "run folder",
            "FAIL",
            (host,),
            f"{path[host]} there does not show what {named(others, evidence.num_hosts)} wrote to theirs",
            fix,
        )
        for host, others in unseen.items()
    ]


def _split(problem: str, otherwise: str) -> tuple[str, str]:
    """Part what was found from its fix, which follows the last semicolon of our messages."""
    found, _, fix = problem.rpartition("; ")
    return (found, f"{fix} (--output.runs_dir)") if found else (problem, f"{otherwise}: --output.runs_dir=DIR")


def check_room(evidence: Evidence) -> list[Finding]:
    """Will the checkpoints fit?"""
    config = evidence.config.checkpoint
    num_kept = config.keep_last + 1 + int(config.keep_best)
    needed = num_kept * evidence.plan.model_bytes
    problems, told = [], []
    for index, _, facts in evidence.present:
        for folder in facts.folders:
            holds_checkpoints = config.folder is None or folder.path == config.folder
            wanted = max(needed if holds_checkpoints else 0, RUN_FOLDER_BYTES)
            if folder.error or folder.free_bytes is None:
                continue
            told.append(folder.free_bytes)
            if folder.free_bytes < wanted:
                found = f"{size(folder.free_bytes)} free in {folder.path}; {size(wanted)} are needed"
                if wanted == needed:
                    found += f", for {num_kept} checkpoints of {size(evidence.plan.model_bytes)}"
                fix = "free some, or choose another disk: --output.runs_dir=DIR, --checkpoint.folder=s3://bucket/prefix"
                problems.append(Finding("room", "FAIL", (evidence.name(index),), found, fix))
    say = f"{size(min(told))} free, {size(max(needed, RUN_FOLDER_BYTES))} needed" if told else "not known here"
    return or_all_well("room", problems, evidence, lambda: say)


def check_data(evidence: Evidence) -> list[Finding]:
    """Does every host read the same whole data set?"""
    problems = []
    for index, _, facts in evidence.present:
        for problem in facts.data.problems:
            found, _, fix = problem.rpartition("; ")
            problems.append(Finding("data", "FAIL", (evidence.name(index),), found or problem, fix if found else ""))
    manifests = {facts.data.manifest_crc32 for *_, facts in evidence.present} - {None}
    if not problems and len(manifests) > 1:
        first = evidence.present[0][2].data.manifest_crc32
        problems = [
            Finding(
                "data",
                "FAIL",
                (evidence.name(index),),
                f"{facts.data.path} there is another data set than on {evidence.name(0)}: their manifests differ",
                "copy the data set anew, or read it from one shared place: --data.path",
            )
            for index, _, facts in evidence.present
            if facts.data.manifest_crc32 != first
        ]
    return or_all_well("data", problems, evidence, lambda: _data_found([facts.data for *_, facts in evidence.present]))


def _data_found(data: list[DataFacts]) -> str:
    checked = set().union(*(each.checked_shards for each in data))
    first = data[0]
    total = f"{first.num_shards:,} shards of {size(first.num_bytes)}"
    if all(len(each.checked_shards) == each.num_shards for each in data):
        return f"{first.path}: {total}, every checksum right on every host"
    return f"{first.path}: {total}, all there; {len(checked):,} of them read and right (--read-gib reads more)"
