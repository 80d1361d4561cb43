"""Two hosts as network namespaces. `python -m tests.train.two_hosts` runs the same cases and shows what the nodes say."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.train.two_hosts import ADDRESSES, CASES, missing, run_case, two_namespaces


@pytest.fixture(autouse=True)
def possible() -> None:
    if reason := missing():
        pytest.skip(reason)


def namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines()}


def connect_and_fail(started: list[subprocess.Popen[str]], names: list[str]) -> None:
    """A connection from one to the other, then an error."""
    server = f"import socket, time; s = socket.create_server(('{ADDRESSES[0]}', 29500)); print(flush=True); s.accept(); print()"
    client = f"import socket, time; socket.create_connection(('{ADDRESSES[0]}', 29500), 5); print()"
    with two_namespaces() as made:
        names += made
        for name, code in zip(made, (server, client), strict=True):
            command = ["ip", "netns", "exec", name, "python3", "-u", "-c", f"{code}; time.sleep(60)"]
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            assert started[-1].stdout is not None
            assert started[-1].stdout.readline() == "\n"
        raise RuntimeError("in the middle")


def test_namespaces_reach_each_other_and_are_taken_down_after_a_failure() -> None:
    started: list[subprocess.Popen[str]] = []
    names: list[str] = []
    with pytest.raises(RuntimeError, match="in the middle"):
        connect_and_fail(started, names)
    assert len(names) == 2
    assert namespaces().isdisjoint(names)
    assert [process.wait(5) for process in started] == [-9, -9]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_node_killed_and_replaced_changes_no_bit(case: str, tmp_path: Path) -> None:
    before = namespaces()
    run_case(case, tmp_path, print)
    assert namespaces() <= before
