"""One command at a time works in a run's folder: who is refused, and whose lock is taken over."""

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace

import pytest
from torch.distributed import TCPStore

from stepdistill import stages
from stepdistill.errors import FolderInUseError
from stepdistill.launch import Launch
from stepdistill.run.lock import LOCK, Holder, locked, release_all
from stepdistill.run.log import read_log
from stepdistill.stages import open_run
from tests.faults.small_run import read_only, room_for, small_config

HOLDS = """
import sys, time
from pathlib import Path
from stepdistill.run.lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""
STOPPED = """
import os, signal, sys
from pathlib import Path
from stepdistill.run.lock import locked
from stepdistill.run.stop import StopRequest
with locked(Path(sys.argv[1])), StopRequest(max_minutes=None):
    print("locked", flush=True)
    for _ in range(2):
        signal.raise_signal(int(sys.argv[2]))
"""
WATCHED = """
import sys, time
from pathlib import Path
from torch.distributed import TCPStore
from stepdistill import launch
from stepdistill.run.lock import locked, release_all
launch._LOOKS_EVERY = launch._MAIN_THREAD_HAS = 0.1
store = TCPStore("127.0.0.1", int(sys.argv[2]), is_master=False, wait_for_workers=False)
with locked(Path(sys.argv[1])):
    launch.Launch(store, name="one", launcher=None, release=release_all).watch()
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def little_patience(monkeypatch):
    monkeypatch.setattr("stepdistill.run.lock._PATIENCE", 0.15)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of the folder tmp_path/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def refusal(folder):
    with pytest.raises(FolderInUseError) as refused, locked(folder):
        raise AssertionError("it is in use")
    return str(refused.value)


def assert_taken(folder, caplog, *, lines):
    """Asserts that the lock can be taken, with this many lines, and is gone afterwards."""
    caplog.set_level("INFO")
    caplog.clear()
    with locked(folder):
        assert Holder.of_text((folder / LOCK).read_bytes()).pid == os.getpid()
    assert len(caplog.records) == lines, caplog.text
    assert not (folder / LOCK).exists()


def test_a_running_process_is_named_with_its_host_its_time_and_what_to_do(tmp_path, holder):
    line = refusal(tmp_path / "run")
    assert f"{tmp_path / 'run'} is in use by process {holder.pid} on {socket.gethostname()}, since 2" in line
    assert "fix: wait until it ends, stop it, or use another name=..." in line
    assert FolderInUseError.exit_code == 3
    assert (tmp_path / "run" / LOCK).exists()


def test_the_lock_of_a_killed_process_is_taken_over_with_one_line(tmp_path, holder, caplog):
    holder.kill()
    holder.wait()
    assert_taken(tmp_path / "run", caplog, lines=1)
    assert f"{LOCK} is left behind by process {holder.pid} on" in caplog.text


def test_the_end_of_a_process_frees_the_folder_without_a_line(tmp_path, holder, caplog):
    holder.send_signal(signal.SIGINT)
    holder.wait()
    assert_taken(tmp_path / "run", caplog, lines=0)


def ended_at_once(script, folder, *words):
    """The exit code of a process that took the lock of a folder and ended by os._exit."""
    process = subprocess.run(
        [sys.executable, "-c", script, str(folder), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.stdout == "locked\n", process.stderr
    return process.returncode


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_second_signal_ends_the_process_and_removes_the_lock(tmp_path, number, code):
    assert ended_at_once(STOPPED, tmp_path, number) == code
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_process_that_ends_because_another_one_failed_removes_the_lock(tmp_path):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    Launch(store, name="one", launcher=None).tell("process 1 of the launch ended: no room")
    assert ended_at_once(WATCHED, tmp_path, store.port) == 8
    assert list(tmp_path.iterdir()) == []


def test_a_forked_process_and_a_lock_of_another_process_are_left_alone(tmp_path):
    with locked(tmp_path):
        assert os.waitstatus_to_exitcode(os.waitpid(fork(release_all), 0)[1]) == 0
        text = (tmp_path / LOCK).read_bytes()
        (tmp_path / LOCK).unlink()
        (tmp_path / LOCK).write_bytes(text)  # as if another process had taken it after somebody removed it
        release_all()
        assert (tmp_path / LOCK).exists()


def test_it_may_be_entered_again_and_is_released_after_an_error(tmp_path):
    with suppress(RuntimeError), locked(tmp_path):
        with locked(tmp_path):
            pass
        assert (tmp_path / LOCK).exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def left_by(**changes):
    return json.dumps(asdict(replace(Holder.here(), **changes)))


def test_the_lock_of_another_machine_is_refused_and_named(tmp_path):
    (tmp_path / LOCK).write_text(left_by(host="elsewhere", boot="0", pid=1))
    assert refusal(tmp_path).endswith(f"if it is certainly gone, remove {tmp_path / LOCK}")
    assert (tmp_path / LOCK).exists()


def test_a_lock_from_before_the_last_boot_is_taken_over(tmp_path, caplog):
    (tmp_path / LOCK).write_text(left_by(boot="before"))
    assert_taken(tmp_path, caplog, lines=1)


def test_the_copy_of_a_folder_in_use_is_free(tmp_path, holder, caplog):
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert_taken(tmp_path / "copy", caplog, lines=1)


@pytest.mark.parametrize("content", [b"", b"\xff", b"[", b"[1]", b'{"host": 1}', b"[" * 3000])
def test_a_damaged_lock_that_nobody_holds_is_taken_over(tmp_path, caplog, content):
    (tmp_path / LOCK).write_bytes(content)
    assert_taken(tmp_path, caplog, lines=0)


@pytest.fixture
def without_flock(monkeypatch):
    def unsupported(*_args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)


def test_without_flock_the_processes_number_and_start_decide(tmp_path, holder, caplog, without_flock):
    folder = tmp_path / "run"
    assert f"process {holder.pid}" in refusal(folder)
    seen = Holder.of_text((folder / LOCK).read_bytes())
    (folder / LOCK).write_text(
        json.dumps(asdict(replace(seen, start=seen.start - 1)))
    )  # the number was given again
    assert_taken(folder, caplog, lines=1)
    (folder / LOCK).write_text(json.dumps(asdict(seen)))
    holder.kill()
    holder.wait()
    assert_taken(folder, caplog, lines=1)
    (folder / LOCK).write_bytes(b"")
    assert "by an unknown process" in refusal(folder)


@pytest.mark.parametrize("left", [None, "stale"])
def test_of_many_starts_at_once_exactly_one_gets_the_folder(tmp_path, left):
    """Forked processes that all begin in the moment in which a pipe is closed; the winner keeps the lock until all have
    tried."""
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        if left is not None:
            (folder / LOCK).write_text(left_by(pid=2**22, start=1))
        start, go = os.pipe()
        children = [fork(lambda f=folder, s=start, g=go: try_it(f, s, g)) for _ in range(6)]
        os.close(start)
        os.close(go)
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
        assert codes == [0] + [3] * 5
        assert list(folder.iterdir()) == []


def fork(body):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = body() or 0
        finally:
            os._exit(code)
    return child


def try_it(folder, start, go):
    os.close(go)
    os.read(start, 1)
    try:
        with locked(folder):
            time.sleep(0.4)
    except FolderInUseError:
        return 3
    return 0


def test_the_other_processes_of_a_launch_take_no_lock(tmp_path, holder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with locked(tmp_path / "run"), locked(tmp_path / "other"):
        assert not (tmp_path / "other" / LOCK).exists()
    monkeypatch.setenv("RANK", "0")
    refusal(tmp_path / "run")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    refusal(tmp_path / "run")


def test_on_a_full_disk_the_empty_file_still_locks(tmp_path):
    with room_for(0), locked(tmp_path):
        assert (tmp_path / LOCK).read_bytes() == b""
        assert os.waitstatus_to_exitcode(os.waitpid(fork(lambda: in_use(tmp_path)), 0)[1]) == 3
    assert list(tmp_path.iterdir()) == []


def in_use(folder):
    import stepdistill.run.lock as lock

    lock._held.clear()
    try:
        with lock.locked(folder):
            return 0
    except FolderInUseError:
        return 3


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    with (
        read_only(tmp_path),
        pytest.raises(ValueError, match=rf"cannot write .*{LOCK}: Permission denied; fix: allow this user"),
        locked(tmp_path),
    ):
        raise AssertionError
    (tmp_path / LOCK).symlink_to("nowhere")
    with pytest.raises(ValueError, match=rf"cannot write .*{LOCK}"), locked(tmp_path):
        raise AssertionError


def test_a_clock_that_is_set_back_changes_nothing(tmp_path, holder, monkeypatch, caplog):
    monkeypatch.setattr(time, "time", lambda: 1e9)
    refusal(tmp_path / "run")
    holder.kill()
    holder.wait()
    assert_taken(tmp_path / "run", caplog, lines=1)


STAGES = {
    "prepare": stages.prepare,
    "distill": stages.distill,
    "export": stages.export,
    "evaluate": stages.evaluate,
    "run": stages.run_all,
}


@pytest.fixture
def config(tmp_path):
    """A run in the folder that `holder` locks."""
    return small_config(tmp_path, "name=run")


@pytest.mark.parametrize(
    "name", [n if n == "run" else pytest.param(n, marks=pytest.mark.slow) for n in STAGES]
)
def test_every_stage_that_writes_is_refused_and_writes_nothing(config, holder, run_command, name):
    if name == "distill":
        open_run(config)  # a run that was never started has no cache, which distill says first
    before = sorted(config.run_dir.iterdir())
    outcome = run_command(lambda: STAGES[name](config))
    assert (outcome.code, len(outcome.errors)) == (3, 1)
    assert f"is in use by process {holder.pid}" in outcome.errors[0]
    assert sorted(config.run_dir.iterdir()) == before


def test_a_report_is_written_while_another_command_works(config, holder, run_command):
    open_run(config)
    line = {"rung": 2, "phase": 0, "objective": "mse", "step": 0, "student_loss": 1.0}
    (config.run_dir / "log.jsonl").write_text(json.dumps(line) + "\n")
    assert run_command(lambda: stages.report(config)).code == 0
    assert run_command(lambda: stages.report_runs([config.run_dir])).code == 0
    assert (config.run_dir / "report" / "index.html").is_file()


@pytest.mark.slow
def test_of_two_commands_started_at_once_one_trains_and_after_a_kill_the_next_continues(whole_run, tmp_path):
    """The loser ends with code 3 and disturbs nothing; a report is written meanwhile; after kill -9 the same command goes on
    with the killed one's updates and finishes."""
    phase = {"objective": "mse", "max_train_steps": 40}
    ladder = [{"teacher_steps": 4, "student_steps": 2, "phases": [phase]}]
    config = small_config(tmp_path, f"ladder={json.dumps(ladder)}", "training.checkpoint.every_minutes=0")
    stages.open_run(config)
    shutil.copytree(whole_run.run_dir / "cache", config.run_dir / "cache")
    log = config.run_dir / "log.jsonl"
    both = [command("distill", config), command("distill", config)]
    while all(process.poll() is None for process in both) or not log.is_file() or not log.read_bytes():
        time.sleep(0.05)
    loser, winner = sorted(both, key=lambda process: process.poll() is None)
    _, message = loser.communicate()
    assert loser.returncode == 3
    assert message.count("is in use by process") == 1
    assert len([text for text in message.splitlines() if text.startswith("stepdistill: ")]) == 1
    assert winner.poll() is None
    report = command("report", config)
    assert report.wait() == 0
    winner.kill()
    winner.wait()
    done = len(read_log(log))
    last = command("distill", config)
    _, message = last.communicate()
    assert last.returncode == 0, message
    assert message.count("is left behind by process") == 1
    assert "continues in phase 0 after" in message
    steps = [record["step"] for record in read_log(log)]
    assert steps == list(range(40))
    assert 0 < done < 40
    assert not list(config.run_dir.rglob(".*"))
    assert not (config.run_dir / LOCK).exists()


def command(name, config):
    words = [sys.executable, "-m", "stepdistill", name, str(config.run_dir)]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
