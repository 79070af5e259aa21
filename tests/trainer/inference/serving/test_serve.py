"""A real server on loopback: its answers, its refusals, and that neither a swap nor a stop fails a request."""

import json
import os
import shutil
import signal
import socket
import threading

import numpy as np
import pytest

from papilio.trainer.inference.package.format import TABLES
from papilio.trainer.inference.package.sample_check import load_checked_scorer
from tests.support.served import (
    ARROW_TYPE,
    JSON_TYPE,
    Load,
    ServerProcess,
    arrow_body,
    json_body,
    read_scores,
    records_of,
    write_package,
)

TOLERANCE = 1e-6
# Longer than a client on a busy machine is idle between two requests: a connection that is idle then is closed.
DRAIN_S = 3.0


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    return [write_package(folder / f"seed{seed}", seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def scorers(packages):
    return [load_checked_scorer(package) for package in packages]


@pytest.fixture
def start(tmp_path):
    """Starts servers; whatever a failed test leaves running is ended."""
    started = []

    def begin(package, name="log", **options) -> ServerProcess:
        started.append(ServerProcess(tmp_path / name, package, **options))
        return started[-1]

    yield begin
    for process in started:
        process.stop()


@pytest.fixture(scope="module")
def server(packages, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    process = ServerProcess(log, packages[0], max_queue=300, max_body_bytes=20_000, body_timeout_s=5, max_batch=64)
    yield process.wait_until_ready()
    assert process.stop() == 0, process.text()


def expected(scorer, records):
    return scorer.score(scorer.encoder.encode_records(records))


@pytest.mark.parametrize("kind", [JSON_TYPE, ARROW_TYPE])
@pytest.mark.parametrize("count", [0, 1, 65])
def test_answers_are_those_of_the_model(server, scorers, kind, count) -> None:
    records = records_of(100, count)
    if kind == ARROW_TYPE and not records:
        pytest.skip("a table needs columns, which no records have")
    status, headers, body = server.predict(records, kind)
    assert (status, headers["content-type"]) == (200, kind)
    assert headers["x-papilio-package"] == "shop@seed_0"
    np.testing.assert_allclose(read_scores(kind, body), expected(scorers[0], records), rtol=0, atol=TOLERANCE)


def test_concurrent_requests_get_their_own_answers(server, scorers) -> None:
    load = Load(server, num_clients=12)
    load.wait_for(300)
    load.end()
    assert load.failures == []
    for number, status, _, scores in load.answers:
        assert status == 200
        np.testing.assert_allclose(scores, expected(scorers[0], records_of(number, 3)), rtol=0, atol=TOLERANCE)


def test_the_example_that_it_shows_works(server) -> None:
    status, _, body = server.request("GET", "/")
    about = json.loads(body)
    assert (status, about["package"]["name"], about["limits"]["records"]) == (200, "shop", 300)
    request, answer = about["example"]["POST /predict"], about["example"]["answer"]
    status, _, body = server.request("POST", "/predict", json.dumps(request).encode())
    assert status == 200
    np.testing.assert_allclose(json.loads(body)["probabilities"], answer["probabilities"], rtol=0, atol=TOLERANCE)


def without(column: str) -> bytes:
    return arrow_body([{k: v for k, v in records_of(1, 1)[0].items() if k != column}])


@pytest.mark.parametrize(
    ("body", "kind", "status", "error"),
    [
        (b"{", JSON_TYPE, 400, "the body is not JSON: Expecting property name"),
        (b"\xff", JSON_TYPE, 400, "the body is not UTF-8 text"),
        (b"[" * 9000, JSON_TYPE, 400, "the body is nested too deeply"),
        (b'{"records": [{"age": 1' + b"0" * 5000 + b"}]}", JSON_TYPE, 400, "the body holds a number that is too long"),
        (b'{"records": [{"age": NaN}]}', JSON_TYPE, 400, "NaN is not JSON; send null where a value is missing"),
        (b'{"rows": []}', JSON_TYPE, 400, 'the body must be {"records": ['),
        (json_body([{}, {"agee": 1}]), JSON_TYPE, 400, "record 1: there is no column 'agee'; did you mean age?"),
        (json_body([{}, {"age": "x"}]), JSON_TYPE, 400, "record 1, column age: 'x' is a string, must be a number"),
        (json_body([{"slot": 3}, {"slot": -3}]), JSON_TYPE, 400, "record 1, column slot: id -3 is out of range"),
        (json_body([{}, {}, {"age": 1e300}]), JSON_TYPE, 400, "record 2, column age: 1e+300 is too large for 32 bits"),
        (json_body([{}] * 301), JSON_TYPE, 413, "301 records, a request may have 300"),
        (b"x" * 20_001, JSON_TYPE, 413, "the body has 20,001 bytes, at most 20,000 are allowed; send fewer"),
        (b"x", "text/csv", 415, "set the header content-type to application/json or application/vnd.apache.arrow.str"),
        (b"ARROW1\0\0", ARROW_TYPE, 400, "the body is not an Arrow IPC stream"),
        (arrow_body(records_of(0, 9))[:-300], ARROW_TYPE, 400, "the body is not an Arrow IPC stream"),
        (without("city"), ARROW_TYPE, 400, "there is no column city; send nulls where values are missing"),
        (arrow_body([records_of(1, 1)[0] | {"slot": -1}]), ARROW_TYPE, 400, "record 0, column slot: id -1 is out"),
    ],
)
def test_malformed_requests_are_told_what_is_wrong(server, body, kind, status, error) -> None:
    found, headers, answer = server.request("POST", "/predict", body, kind)
    message = json.loads(answer)
    assert (found, message["error"][: len(error)]) == (status, error)
    assert headers["content-type"] == JSON_TYPE
    if ", column " in error:
        assert message["column"] in error
        assert f"record {message['record']}," in error


def test_damaged_arrow_streams_never_end_the_server(server) -> None:
    sound = arrow_body(records_of(0, 5))
    generator = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(sound)
        for place in generator.integers(0, len(sound), 4):
            damaged[place] = generator.integers(0, 256)
        status, _, _ = server.request("POST", "/predict", bytes(damaged), ARROW_TYPE)
        assert status in {200, 400, 413}
    assert server.request("GET", "/healthz")[0] == 200


def test_one_malformed_request_leaves_its_batch_alone(server, scorers) -> None:
    load = Load(server, num_clients=6)
    for _ in range(20):
        assert server.predict([{}, {"slot": "x"}])[0] == 400
    load.end()
    assert load.failures == []
    assert {status for _, status, _, _ in load.answers} == {200}


@pytest.mark.parametrize(
    ("method", "path", "status", "error"),
    [
        ("GET", "/predict", 405, "send records with POST"),
        ("DELETE", "/metrics", 405, "only GET is allowed here"),
        ("POST", "/v1/models", 404, "no such path; there are POST /predict, GET /, /healthz, /readyz, /metrics"),
    ],
)
def test_other_paths_and_methods_are_refused(server, method, path, status, error) -> None:
    found, headers, body = server.request(method, path, b"{}" if method == "POST" else b"")
    assert (found, json.loads(body)["error"][: len(error)]) == (status, error)
    assert (headers["allow"] is not None) == (status == 405)


def test_health_and_readiness(server) -> None:
    assert server.request("HEAD", "/healthz")[::2] == (200, b"")
    status, _, body = server.request("GET", "/readyz")
    assert (status, json.loads(body)) == (200, {"status": "ready", "package": "shop@seed_0"})


def test_a_body_in_chunks_is_read_and_bounded(server) -> None:
    connection = server.connect()
    body = json_body(records_of(0, 2))
    connection.request("POST", "/predict", iter([body[:10], body[10:]]), {"content-type": JSON_TYPE})
    assert connection.getresponse().status == 200
    connection = server.connect()
    connection.request("POST", "/predict", iter([b"x" * 5000] * 5), {"content-type": JSON_TYPE})
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())["error"][:22]) == (413, "the body has more byte")


def test_a_body_that_does_not_come_is_not_waited_for(server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{")
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_metrics_count_what_was_done(server) -> None:
    before = server.figures()
    for count in (1, 2, 40):
        server.predict(records_of(0, count))
    middle = server.figures()
    row = {"price": 1, "age": None, "city": "Bonn", "tags": ["tag1", "new"], "item": None, "slot": 9}
    assert server.predict([row], ARROW_TYPE)[0] == 200
    server.predict([{"age": "x"}])
    after = server.figures()
    # Bonn, new and slot 9; of the malformed record none counts.
    assert after["papilio_unknown_ids_total"] - middle["papilio_unknown_ids_total"] == 3
    assert after["papilio_ids_total"] - middle["papilio_ids_total"] == 5 + 3

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown('papilio_requests_total{format="json",status="200"}') == 3
    assert grown('papilio_requests_total{format="json",status="400"}') == 1
    assert grown("papilio_request_seconds_count") == grown('papilio_request_seconds_bucket{le="+Inf"}')
    assert grown("papilio_batch_records_count") == 5  # one by one: each a batch
    assert grown('papilio_batch_records_bucket{le="1"}') == 3
    assert grown("papilio_records_scored_total") == grown("papilio_batch_records_sum") == 1 + 2 + 40 + 1 + 1
    assert after["papilio_ready_processes"] == 1
    assert after["papilio_waiting_records"] == after["papilio_requests_in_flight"] == 0
    buckets = [value for name, value in after.items() if name.startswith("papilio_request_seconds_bucket")]
    assert buckets == sorted(buckets)
    quantiles = [value for name, value in after.items() if name.startswith("papilio_request_seconds_last_minute")]
    assert len(quantiles) == 4
    assert 0 < quantiles[0] <= quantiles[-1] < 30
    (package,) = (name for name in after if name.startswith("papilio_package_info"))
    assert 'name="shop"' in package
    assert 'checkpoint="seed_0"' in package


def test_overload_is_refused_and_told_when_to_come_back(packages, start) -> None:
    server = start(packages[0], max_queue=64, max_batch=64).wait_until_ready()
    answers = []

    def client() -> None:
        for _ in range(10):
            status, headers, body = server.predict(records_of(0, 64))
            answers.append((status, headers["retry-after"], len(json.loads(body).get("probabilities", []))))

    threads = [threading.Thread(target=client) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(answers) == {(200, None, 64), (503, "1", 0)}
    figures = server.figures()
    refused = sum(status == 503 for status, _, _ in answers)
    assert figures['papilio_requests_total{format="json",status="503"}'] == refused
    assert server.stop() == 0


def link_to(link, package) -> None:
    os.symlink(package, str(link) + ".new")
    os.replace(str(link) + ".new", link)


def test_a_swap_under_load_fails_no_request_and_a_bad_package_never_takes_over(
    packages, scorers, tmp_path, start
) -> None:
    link = tmp_path / "current"
    link_to(link, packages[0])
    server = start(str(link)).wait_until_ready()
    load = Load(server, num_clients=8)
    load.wait_for(100)
    link_to(link, packages[1])
    server.hang_up()
    server.wait_for("package shop@seed_1 replaces shop@seed_0")
    load.wait_for(100)
    damaged = shutil.copytree(packages[0], tmp_path / "damaged")
    with (damaged / TABLES).open("r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 8)
    for bad, reason in ((damaged, "tables.bin is damaged"), (tmp_path / "nowhere", "nowhere does not exist")):
        link_to(link, bad)
        server.hang_up()
        server.wait_for(reason)
    load.wait_for(100)
    load.end()
    assert load.failures == []
    labels = [label for _, _, label, _ in load.answers]
    assert {"shop@seed_0", "shop@seed_1"} == set(labels)
    for number, status, label, scores in load.answers:
        assert status == 200
        scorer = scorers[int(label[-1])]
        np.testing.assert_allclose(scores, expected(scorer, records_of(number, 3)), rtol=0, atol=TOLERANCE)
    figures = server.figures()
    assert figures['papilio_package_swaps_total{result="done"}'] == 1
    assert figures['papilio_package_swaps_total{result="refused"}'] == 2
    assert "package refused, shop@seed_1 keeps serving" in server.text()
    assert server.stop() == 0


def test_a_watched_link_is_followed_and_sigterm_under_load_fails_no_request(packages, tmp_path, start) -> None:
    link = tmp_path / "current"
    link_to(link, packages[1])
    server = start(str(link), watch_s=0.05, drain_s=DRAIN_S).wait_until_ready()
    load = Load(server, num_clients=10)
    link_to(link, packages[0])
    server.wait_for("package shop@seed_0 replaces shop@seed_1")  # it watches the link by itself
    load.wait_for(200)
    server.process.terminate()
    load.join()
    assert server.process.wait(120) == 0, server.text()
    assert load.failures == []
    assert {status for _, status, _, _ in load.answers} == {200}
    assert f"stopped after {len(load.answers):,} answers" in server.text()


def test_several_processes_share_a_port_and_their_figures(packages, start) -> None:
    server = start(packages[0], workers=2, drain_s=DRAIN_S).wait_until_ready(2)
    load = Load(server, num_clients=8)
    load.wait_for(200)
    load.end()
    assert load.failures == []
    figures = server.figures()
    assert figures['papilio_requests_total{format="json",status="200"}'] == len(load.answers)
    assert figures["papilio_ready_processes"] == 2
    pids = [int(word) for word in server.text().split() if word.isdigit()]
    os.kill(pids[0], signal.SIGKILL)
    server.wait_until_ready(3)
    assert server.figures()["papilio_ready_processes"] == 2
    assert server.predict(records_of(0, 1))[0] == 200
    load = Load(server, num_clients=8)
    load.wait_for(100)
    server.process.terminate()
    load.join()
    assert server.process.wait(120) == 0, server.text()
    assert load.failures == []


def test_servers_that_cannot_start_say_why(packages, tmp_path, start) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        server = start(packages[0], "taken", port=port)
        assert server.process.wait(120) == 1
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use; choose another --port" in server.text()
    server = start(str(tmp_path), "none")
    assert server.process.wait(120) == 1
    assert "is not a package: it has no package.json" in server.text()
    damaged = shutil.copytree(packages[0], tmp_path / "damaged")
    (damaged / "dense.safetensors").write_bytes(bytes((damaged / "dense.safetensors").stat().st_size))
    server = start(str(damaged), "damaged_log", workers=2)
    assert server.process.wait(120) == 1
    assert "dense.safetensors is damaged" in server.text()
