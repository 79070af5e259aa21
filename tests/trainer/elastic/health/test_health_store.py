import time
from pathlib import Path

import torch.distributed as dist

from papilio.trainer.elastic.health.health_store import HealthStore, RankFailure, open_health_store
from papilio.trainer.elastic.health.heartbeat import RankFigures
from tests.support.heartbeats import heartbeat_of


def failure_of(rank: int) -> RankFailure:
    return RankFailure(rank, f"host-{rank}", 1_200 + rank, f"ValueError: {rank}", 1e9)


def test_heartbeats_are_read_as_they_were_written(tmp_path: Path) -> None:
    writer = HealthStore(dist.FileStore(str(tmp_path / "store"), -1))
    reader = HealthStore(dist.FileStore(str(tmp_path / "store"), -1))
    assert reader.heartbeats(3) == {}
    writer.publish(heartbeat_of(2, 5))
    writer.publish(heartbeat_of(0, 6))
    writer.publish(heartbeat_of(2, 7, has_left=True))
    assert reader.heartbeats(3) == {0: heartbeat_of(0, 6), 2: heartbeat_of(2, 7, has_left=True)}
    assert reader.heartbeats(1) == {0: heartbeat_of(0, 6)}


def test_figures_travel_with_a_heartbeat(tmp_path: Path) -> None:
    health_store = HealthStore(dist.FileStore(str(tmp_path / "store"), -1))
    heartbeat = heartbeat_of(1, 9, figures=RankFigures(12.5, 0.25, 40, 1.5, None, (("t_C3", 0.61),)))
    health_store.publish(heartbeat)
    assert health_store.heartbeats(2) == {1: heartbeat}


def test_all_heartbeats_of_many_ranks_are_two_questions() -> None:
    class Counted:
        def __init__(self) -> None:
            self.questions: list[str] = []

        def check(self, keys: list[str]) -> bool:
            self.questions.append("check")
            return True

        def multi_get(self, keys: list[str]) -> list[bytes]:
            self.questions.append("multi_get")
            return [heartbeat_of(int(key.rpartition("/")[2]), 3).to_json().encode() for key in keys]

    store = Counted()
    assert HealthStore(store).heartbeats(512) == {rank: heartbeat_of(rank, 3) for rank in range(512)}
    assert store.questions == ["check", "multi_get"]


def test_the_first_failure_stands(tmp_path: Path) -> None:
    one = HealthStore(dist.FileStore(str(tmp_path / "store"), -1))
    other = HealthStore(dist.FileStore(str(tmp_path / "store"), -1))
    assert other.first_failure() is None
    assert one.note_failure(failure_of(1)) == failure_of(1)
    assert other.note_failure(failure_of(0)) == failure_of(1)
    assert other.first_failure() == one.first_failure() == failure_of(1)


def test_a_new_round_forgets(tmp_path: Path) -> None:
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    health_store = HealthStore(dist.PrefixStore("p", store))
    health_store.publish(heartbeat_of(0, 6))
    health_store.note_failure(failure_of(0))
    health_store.purge(2)
    assert health_store.heartbeats(2) == {}
    assert health_store.first_failure() is None


def test_failures_read_as_a_sentence() -> None:
    assert str(failure_of(2)) == "rank 2 (host host-2) failed first, at step 1,202: ValueError: 2"
    assert str(RankFailure(2, "h", -1, "killed by SIGKILL", 0.0)) == "rank 2 (host h) failed first: killed by SIGKILL"


def test_without_a_store_all_is_silence() -> None:
    health_store = HealthStore(None)
    health_store.publish(heartbeat_of(0, 6))
    assert health_store.heartbeats(2) == {}
    assert health_store.first_failure() is None
    assert health_store.note_failure(failure_of(1)) == failure_of(1)
    assert not health_store.is_answering


def environment_of(port: int) -> dict[str, str]:
    return {
        "PET_RDZV_ENDPOINT": f"localhost:{port}",
        "TORCHELASTIC_RUN_ID": "j",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }


def test_a_store_that_dies_is_silence_too() -> None:
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    health_store = open_health_store(environment_of(server.port))
    health_store.publish(heartbeat_of(0, 6))
    assert (health_store.is_answering, health_store.heartbeats(1)) == (True, {0: heartbeat_of(0, 6)})
    del server
    begin_s = time.monotonic()
    assert health_store.heartbeats(1) == {}
    assert not health_store.is_answering
    assert health_store.note_failure(failure_of(1)) == failure_of(1)
    assert time.monotonic() - begin_s < 30


def test_rounds_do_not_read_each_other() -> None:
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environment = environment_of(server.port)
    open_health_store(environment).note_failure(failure_of(1))
    assert open_health_store(environment).first_failure() == failure_of(1)
    assert open_health_store({**environment, "MASTER_PORT": "2"}).first_failure() is None
    plain = {"TORCHELASTIC_RUN_ID": "j", "MASTER_ADDR": "localhost", "MASTER_PORT": str(server.port)}
    open_health_store({**plain, "TORCHELASTIC_RESTART_COUNT": "0"}).note_failure(failure_of(0))
    assert open_health_store({**plain, "TORCHELASTIC_RESTART_COUNT": "1"}).first_failure() is None


def test_outside_a_job_the_channel_is_mute() -> None:
    assert not open_health_store({}).is_answering
    assert not open_health_store({"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}).is_answering
