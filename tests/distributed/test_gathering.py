"""Processes gather: in threads, over real sockets, without JAX."""

from __future__ import annotations

import dataclasses
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from sealion_jax.distributed import DistributedConfig, gathering, knocking
from sealion_jax.distributed.cluster import Cluster
from sealion_jax.distributed.gathering import Gathering, PortTakenError
from sealion_jax.distributed.knocking import Knocking
from sealion_jax.distributed.meeting import meet
from sealion_jax.distributed.words import PROTOCOL, Introduction, Verdict, encode
from tests.commands import free_port


@pytest.fixture
def threads():
    with ThreadPoolExecutor(16) as pool:
        yield pool


@pytest.fixture
def port() -> int:
    return free_port()


def who(process: int, *, processes: int = 3, **more) -> Introduction:
    given = {"host": f"node{process}", "pid": process + 1, "facts": {"code": "a"}, **more}
    return Introduction(process=process, processes=processes, **given)


def gather(threads, port: int, own: Introduction, *, limit: float = 10.0, **more) -> Future[Verdict]:
    return threads.submit(lambda: Gathering(own=own, port=port, **more).run(limit, told_seconds=limit))


def knock(threads, port: int, own: Introduction, *, limit: float = 10.0, **more) -> Future[Verdict]:
    return threads.submit(lambda: Knocking(own=own, host="127.0.0.1", port=port, **more).run(limit))


def until_it_listens(port: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.01)
    raise AssertionError("nobody listens")


def verdicts(futures: list[Future[Verdict]]) -> list[Verdict]:
    found = [future.result(timeout=30) for future in futures]
    assert len({one.verdict for one in found}) == 1, found
    return found


def test_all_get_the_same_verdict_and_the_port_is_free_again(threads, port):
    knocked = [knock(threads, port, who(n)) for n in (2, 1)]
    time.sleep(0.3)  # they come before process 0, and go on knocking
    found = verdicts([gather(threads, port, who(0)), *knocked])
    assert found[0] == Verdict(verdict="go", hosts=("node0", "node1", "node2"))
    assert found[1:] == found[:1] * 2
    socket.create_server(("127.0.0.1", port)).close()


def test_sixty_four_gather(threads):
    port = free_port()
    with ThreadPoolExecutor(64) as pool:
        started = time.monotonic()
        futures = [knock(pool, port, who(n, processes=64)) for n in range(1, 64)]
        found = verdicts([gather(pool, port, who(0, processes=64)), *futures])
    assert found[0].hosts == tuple(f"node{n}" for n in range(64))
    assert time.monotonic() - started < 10


def test_the_missing_are_named_to_all_within_the_limit(threads, port):
    started = time.monotonic()
    hosts = ["node0", "node1", "node2"]
    there = [gather(threads, port, who(0), limit=1.0, hosts=hosts), knock(threads, port, who(1), limit=1.0)]
    for one in verdicts(there):
        assert one.verdict == "refused"
        assert one.text.startswith(
            "process 2 (node2) did not come within 1 s; there were 0 (node0), 1 (node1)"
        )
    assert time.monotonic() - started < 4


def test_a_process_whose_time_is_up_first_knows_whom_process_0_waits_for(threads, port):
    longer = gather(threads, port, who(0), limit=8.0)
    (told,) = verdicts([knock(threads, port, who(1), limit=-1.0)])
    assert "waiting for process 2" in told.text
    assert "process 1 on node1 waited" in told.text
    knock(threads, port, who(1)), knock(threads, port, who(2))
    assert longer.result(timeout=20).verdict == "go"


def test_a_coordinator_that_never_comes_is_told(threads, port):
    (told,) = verdicts([knock(threads, port, who(1), limit=-2.5)])
    assert "process 0 did not come" in told.text
    assert f"127.0.0.1:{port}" in told.text
    assert "refused" in told.text


def test_a_name_that_is_not_known_is_told():
    lost = Knocking(own=who(1), host="no-such-host.invalid", port=1)
    assert "no-such-host.invalid is not known here" in lost.run(-2.5).text


def test_two_of_one_number_are_refused_and_late_ones_hear_of_it(threads, port):
    there = [gather(threads, port, who(0))]
    there += [knock(threads, port, who(1, pid=pid)) for pid in (21, 22)]
    time.sleep(1.0)
    started = time.monotonic()
    there.append(knock(threads, port, who(2)))
    for one in verdicts(there):
        assert "two processes were started as process 1" in one.text
        assert "pid 21 on node1" in one.text
        assert "pid 22 on node1" in one.text
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        (
            who(1, processes=2),
            "process 1 on node1 was started as one of 2 processes, process 0 on node0 as one",
        ),
        (who(3), "process 3 on node3 was started, but there are 3 processes"),
        (who(0, host="other", pid=9), "two processes were started as process 0: pid 1 on node0 and pid 9 on"),
    ],
)
def test_a_wrong_world_is_told_to_all(threads, port, odd, told):
    right = [who(2)] if odd.process == 1 else [who(1), who(2)]
    there = [gather(threads, port, who(0)), *(knock(threads, port, one) for one in [*right, odd])]
    assert all(told in one.text for one in verdicts(there))


def test_another_recipe_is_told_to_all(threads, port):
    there = [gather(threads, port, who(0)), knock(threads, port, who(1))]
    there.append(knock(threads, port, who(2, facts={"code": "b"})))
    for one in verdicts(there):
        assert one.text.startswith(
            "process 2 on node2 has another code than the others: b there, a elsewhere"
        )


def test_one_that_dies_meanwhile_may_come_again(threads, port):
    gathered = gather(threads, port, who(0))
    until_it_listens(port)
    with socket.create_connection(("127.0.0.1", port)) as first:
        first.sendall(encode(dataclasses.asdict(who(1, pid=77))))
        first.recv(100)
    there = [gathered, knock(threads, port, who(1, pid=78)), knock(threads, port, who(2))]
    assert verdicts(there)[0].verdict == "go"


def test_one_whose_host_vanished_may_be_started_elsewhere(threads, port, monkeypatch):
    """Its connection stays open, and nobody answers there; one that lives would be asked, and answer."""
    monkeypatch.setattr(gathering, "_ANSWER_SECONDS", 0.5)
    gathered = gather(threads, port, who(0))
    until_it_listens(port)
    with socket.create_connection(("127.0.0.1", port)) as vanished:
        vanished.sendall(encode(dataclasses.asdict(who(1, pid=77))))
        assert b"clock" in vanished.recv(1000)
        vanished.sendall(encode({"clock": time.time()}))
        there = [gathered, knock(threads, port, who(1, pid=78, host="elsewhere"))]
        time.sleep(1.0)
        there.append(knock(threads, port, who(2)))
        assert verdicts(there)[0] == Verdict(verdict="go", hosts=("node0", "elsewhere", "node2"))


def test_one_too_many_with_nobody_there_is_told_soon(port, monkeypatch):
    monkeypatch.setattr(knocking, "GRACE_SECONDS", 0.0)
    started = time.monotonic()
    cluster = Cluster(
        kind="flags",
        name="",
        coordinator_address=f"127.0.0.1:{port}",
        num_processes=2,
        process_id=2,
    )
    told = meet(who(2, processes=2), cluster, DistributedConfig(), lambda: False)
    assert told.verdict == "refused"
    assert told.text.startswith("--process-id 2 is too high for --num-processes 2")
    assert time.monotonic() - started < 4


def test_process_0_may_die_and_come_again(threads, port):
    knocked = [knock(threads, port, who(n)) for n in (1, 2)]
    with socket.create_server(("127.0.0.1", port)) as dying:
        taken = [dying.accept()[0] for _ in range(2)]
        for connection in taken:
            connection.recv(100)
            connection.close()
    assert verdicts([gather(threads, port, who(0)), *knocked])[0].verdict == "go"


def test_strangers_do_not_disturb(threads, port):
    gathered = gather(threads, port, who(0))
    until_it_listens(port)
    silent = socket.create_connection(("127.0.0.1", port))
    for text in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00\xff" * 5000,
        encode({"protocol": PROTOCOL, "process": "1"}),
    ):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(text)
    started = time.monotonic()
    there = [gathered, knock(threads, port, who(1)), knock(threads, port, who(2))]
    assert verdicts(there)[0].verdict == "go"
    assert time.monotonic() - started < 5
    silent.close()


def test_a_run_that_was_requeued_does_not_take_in_its_predecessors_processes(threads, port):
    gathered = gather(threads, port, who(0, job="job 42 restart 1"))
    old = knock(threads, port, who(1, job="job 42 restart 0"), limit=-1.5)
    told = old.result(timeout=20)
    assert told.verdict == "refused"
    assert "job 42 restart 1 waits there, not this run (job 42 restart 0)" in told.text
    new = [knock(threads, port, who(n, job="job 42 restart 1")) for n in (1, 2)]
    assert verdicts([gathered, *new])[0].verdict == "go"


def test_a_port_that_is_taken_is_noticed_at_once(port):
    with socket.create_server(("127.0.0.1", port)), pytest.raises(PortTakenError):
        Gathering(own=who(0), port=port).run(5.0, told_seconds=5.0)


def test_one_that_is_asked_to_stop_stops_all(threads, port):
    asked = threading.Event()
    there = [gather(threads, port, who(0)), knock(threads, port, who(1), asked_to_stop=asked.is_set)]
    time.sleep(0.5)
    asked.set()
    found = verdicts(there)
    assert {one.verdict for one in found} == {"stop"}
    assert "process 1 on node1 was asked to stop" in found[0].text


def test_a_clock_that_is_off_is_a_warning(threads, port):
    def late_clock(connection: socket.socket) -> None:
        connection.sendall(encode(dataclasses.asdict(who(1))))
        assert b"clock" in connection.recv(1000)
        connection.sendall(encode({"clock": time.time() - 60}))
        connection.recv(100_000)

    gathered = gather(threads, port, who(0, processes=3))
    until_it_listens(port)
    other = knock(threads, port, who(2))
    with socket.create_connection(("127.0.0.1", port)) as connection:
        late_clock(connection)
        found = verdicts([gathered, other])[0]
    assert found.verdict == "go"
    (warning,) = found.warnings
    assert "the clock of node1 is 60.0 s behind" in warning
