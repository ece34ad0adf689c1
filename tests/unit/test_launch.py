"""What a process of a launch prints when it ends, and what it tells the others: with a real store, and no other process."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch.distributed import PrefixStore, TCPStore

from stepdistill import launch
from stepdistill.errors import DistributedError
from stepdistill.launch import Launch, agree, collective, ending, is_of_another_process
from stepdistill.runtime import meet


@pytest.fixture(scope="module")
def server():
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))


@pytest.fixture
def processes(server, request):
    """Three processes of one launch, each with its connection to the store."""
    stores = [TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False) for _ in range(3)]
    return [Launch(store, name=request.node.name, launcher=None) for store in stores]


def ended(process, number, monkeypatch, message, code, **options):
    """What process number `number` prints, and its exit code."""
    monkeypatch.setattr(launch, "_launch", process)
    monkeypatch.setenv("RANK", str(number))
    outcome = []
    # SIGTERM is ignored in the main thread only
    thread = threading.Thread(target=lambda: outcome.append(ending(message, code, **options)))
    thread.start()
    thread.join()
    return outcome[0]


def test_one_process_prints_its_own_message(monkeypatch):
    monkeypatch.setattr(launch, "_launch", None)
    monkeypatch.delenv("RANK", raising=False)
    assert ending("wrong", 2) == ("wrong", 2)


def test_an_error_that_all_have_is_printed_once_and_others_by_each(processes, monkeypatch):
    assert processes[0].note() is None
    for number, expected in enumerate([("not finite", 6), (None, 6)]):
        assert ended(processes[number], number, monkeypatch, "not finite", 6) == expected
    assert ended(processes[2], 2, monkeypatch, "no room", 2) == ("no room", 2)
    assert processes[2].note() == "process 0 of the launch ended: not finite"


def test_the_others_say_which_process_failed_instead_of_what_they_noticed(processes, monkeypatch):
    assert ended(processes[1], 1, monkeypatch, "no room", 2) == ("no room", 2)
    note = "process 1 of the launch ended: no room"
    assert ended(processes[0], 0, monkeypatch, "another process ended", 8) == (note, 8)
    # a launcher ends the others by SIGTERM: this is no stop after which the run is to continue
    assert ended(processes[2], 2, monkeypatch, "stopped (SIGTERM)", 75) == (None, 8)


def test_an_agreed_stop_is_no_failure_and_is_printed_once_whatever_its_reason(processes, monkeypatch):
    for number, message, printed in (
        (1, "stopped (SIGTERM)", "stopped (SIGTERM)"),
        (0, "stopped (training.max_minutes is used)", None),
    ):
        outcome = ended(processes[number], number, monkeypatch, message, 75, is_agreed=True)
        assert outcome == (printed, 75)
    assert processes[2].note() is None


@pytest.mark.parametrize(("message", "code"), [("stopped (SIGTERM)", 75), ("stopped (Ctrl-C)", 130)])
def test_a_stop_of_one_process_ends_the_others(processes, monkeypatch, message, code):
    assert ended(processes[1], 1, monkeypatch, message, code) == (message, code)
    note = f"process 1 of the launch ended: {message}"
    assert processes[2].note() == note
    assert ended(processes[0], 0, monkeypatch, message, code) == (None, code)  # it got the same signal
    assert ended(processes[2], 2, monkeypatch, "another process ended", 8) == (note, 8)


def test_a_store_that_is_gone_stops_no_message(monkeypatch):
    lost = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store = TCPStore("127.0.0.1", lost.port, is_master=False, wait_for_workers=False)
    process = Launch(store, name="lost", launcher=None)
    del lost
    assert ended(process, 1, monkeypatch, "no room", 2) == ("no room", 2)


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (
            "[gloo/pair.cc:553] Connection closed by peer [::1]:1. GLHF",
            "ended (Connection closed by peer [::1]:1)",
        ),
        (
            "[gloo/pair.cc:1] Timed out waiting 6000ms for recv operation to complete",
            "did not answer within training.distributed_timeout (Timed out waiting 6000ms for recv operation to complete)",
        ),
    ],
)
def test_an_error_of_an_operation_of_all_processes_is_one_line(cause, expected):
    with pytest.raises(DistributedError) as raised, collective():
        raise RuntimeError(cause)
    assert str(raised.value).startswith(f"another process of the launch {expected}; fix: ")


def agreed(server, scope, ranks, *, count=3, seconds=30.0):
    """What `agree` returns, or the error that it raises, in these processes of one start; scope: the launch's."""

    def one(rank):
        store = TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
        try:
            return agree(PrefixStore(scope, store), rank, count, until=time.monotonic() + seconds)
        except DistributedError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(one, ranks))


def test_each_start_of_a_launch_agrees_on_a_new_name_in_the_same_store(server, request):
    names = [agreed(server, request.node.name, ranks) for ranks in ((0, 1, 2), (2, 1, 0), (1, 0, 2))]
    for start in names:
        assert len(set(start)) == 1
    assert len({start[0] for start in names}) == 3


@pytest.mark.parametrize(
    "early",
    [{0: 1, 2: None}, {0: 2, 1: None}, {1: 0, 2: 0}, {0: 1}, {1: 0}],
    ids=lambda early: "and".join(map(str, early)),
)
def test_processes_that_ended_before_all_had_met_do_not_disturb_the_next_start(server, request, early):
    """early: by process, the one that its message names; None if it meets process 0 and gets a name."""
    outcomes = agreed(server, request.node.name, early, seconds=1.0)
    for outcome, named in zip(outcomes, early.values(), strict=True):
        if named is None:
            assert len(outcome) == 32
        else:
            says = f"process {named} of the launch did not answer within training.distributed_timeout, at the start"
            assert outcome.startswith(says)
    (name, *others) = agreed(server, request.node.name, (0, 1, 2))
    assert others == [name, name]
    assert name not in outcomes


def test_a_launch_in_which_accelerate_sees_one_process_is_refused(monkeypatch, tmp_path):
    """As on GPUs without LOCAL_RANK: every process would train alone."""
    monkeypatch.setattr(launch, "name_start", lambda _timeout: ("start", {"world_size": 2}))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_backend, **_options: None)
    with pytest.raises(
        ValueError, match=r"WORLD_SIZE is 2 .* accelerate sees 1 process; fix: set LOCAL_RANK"
    ):
        meet(tmp_path, timeout_minutes=1, release=lambda: None)


def test_other_errors_in_such_an_operation_stay_as_they_are():
    with pytest.raises(torch.OutOfMemoryError), collective():
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert is_of_another_process(torch.distributed.DistNetworkError("reset"))
    assert not is_of_another_process(RuntimeError("reset"))


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE is 2 in the environment, but RANK and MASTER_ADDR and MASTER_PORT are not",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"},
            "but MASTER_ADDR is not set; fix: launch with torchrun",
        ),
        ({"RANK": "x"}, "RANK: got 'x' in the environment; allowed: a number"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "-1"}, "MASTER_PORT: got '-1'"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node-0", "MASTER_PORT": "29500"}, None),
        ({}, None),
    ],
)
def test_an_environment_in_which_processes_cannot_meet_is_named(monkeypatch, variables, says):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with contextlib.nullcontext() if says is None else pytest.raises(ValueError, match=says):
        launch.check_environment()
