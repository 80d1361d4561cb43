"""Started by torchrun and by examples/launch/torchrun.sh: what failed is started again and goes on by itself."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from opencoder.checkpoint import folders
from opencoder.errors import DataError
from opencoder.train import __main__ as command
from tests.train.test_run import TORCHRUN, config, losses, prefix, read_rows, same_checkpoints  # noqa: F401  a fixture

LAUNCHER = Path(__file__).parents[2] / "examples" / "launch" / "torchrun.sh"
# This interpreter: the one that `python` names may not have opencoder.
ENVIRONMENT = os.environ | {"PYTHON": sys.executable, "NPROC_PER_NODE": "2"}


def launch(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The launch script; `variables` beside the environment's."""
    return subprocess.run(
        [str(LAUNCHER), *arguments],
        env=ENVIRONMENT | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def worker(agent: int, rank: int) -> int:
    """Process id of a rank started by the agent."""
    for pid in map(int, Path(f"/proc/{agent}/task/{agent}/children").read_text().split()):
        if f"RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
            return pid
    raise AssertionError(f"agent {agent} has no rank {rank}")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the worker through Linux's /proc")
def test_a_killed_worker_is_started_again_and_nothing_differs(tmp_path: Path, prefix: Path) -> None:  # noqa: F811
    steps = {"steps": 24}
    undisturbed, killed = (config(tmp_path, prefix, name, train=steps) for name in ("undisturbed", "killed"))
    with subprocess.Popen(
        [LAUNCHER, undisturbed, "checkpoint.every=24"],
        env=ENVIRONMENT | {"MAX_RESTARTS": "0", "CHECK": "0"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 1/"):
                process.send_signal(signal.SIGUSR1)  # to the script, which hands it on to the workers
    assert process.returncode == 0
    saved = {folders.step_of(folder) for folder in folders.list_checkpoints(tmp_path / "undisturbed")}
    assert len(saved) == 2, "SIGUSR1 saves between the steps of the schedule"

    alive, resumed = True, []
    with subprocess.Popen(
        [*TORCHRUN, "--max-restarts", "1", "-m", "opencoder.train", str(killed)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 6/") and alive:
                alive = False
                os.kill(worker(process.pid, 1), signal.SIGKILL)
            resumed += [line] if line.startswith("resumed from") else []
    assert process.returncode == 0
    assert len(resumed) == 1
    assert 4 <= int(resumed[0].split()[-1]) < 24
    names = [tmp_path / "undisturbed", tmp_path / "killed"]
    exact = ("step", "loss", "grad_norm", "lr", "tokens")
    rows = [[[row[key] for key in exact] for row in read_rows(run / "metrics.jsonl")] for run in names]
    assert rows[0] == rows[1]
    assert len(losses(tmp_path / "killed")) == 24
    assert same_checkpoints(*names)


@pytest.mark.slow
def test_the_launch_script_saves_at_ctrl_c(tmp_path: Path, prefix: Path) -> None:  # noqa: F811
    path = config(tmp_path, prefix, train={"steps": 2000}, checkpoint={"every": 2000})
    with subprocess.Popen(
        [LAUNCHER, path],
        env=ENVIRONMENT | {"CHECK": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 3/"):
                os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of the foreground
    assert process.returncode == 1  # torchrun's own status
    assert 3 <= folders.step_of(folders.resolve(tmp_path / "run")) < 2000


def test_a_mistake_of_the_user_says_that_torchrun_goes_on_in_vain(
    tmp_path: Path,
    prefix: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = config(tmp_path, prefix)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    for count, hint in (("1", "hint: torchrun starts this 2 more times, in vain"), ("3", "")):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        with pytest.raises(DataError, match=r"none\.bin does not exist"):
            command.main([str(path), "data.blend.0.prefix=none", "train.threads=null"])
        assert capsys.readouterr().err[: len(hint) or None].strip() == hint


@pytest.mark.parametrize(
    ("arguments", "variables", "told"),
    [
        ([], {}, "no configuration given"),
        (["--tp", "2"], {}, "unknown option --tp"),
        (["none.yaml"], {}, "there is no configuration file none.yaml"),
        (["CONFIG"], {"NNODES": "2"}, "NNODES=2 needs RDZV_ENDPOINT=HOST:PORT"),
        (["CONFIG"], {"NNODES": "two"}, "NNODES=two must be a whole number from 1 on"),
        (["CONFIG"], {"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE=0 must be a whole number from 1 on"),
        (["CONFIG"], {"PYTHON": "no-python"}, "PYTHON=no-python is no command"),
        (["CONFIG", "parallel.tp=3"], {"NPROC_PER_NODE": "3"}, "cannot be split over parallel.tp=3"),
    ],
)
def test_the_launch_script_refuses_in_one_line(
    arguments: list[str],
    variables: dict[str, str],
    told: str,
    tmp_path: Path,
    prefix: Path,  # noqa: F811
) -> None:
    path = str(config(tmp_path, prefix))
    done = launch(*(path if argument == "CONFIG" else argument for argument in arguments), **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_the_launch_script_tells_its_variables() -> None:
    told = launch("--help").stdout
    read = set(re.findall(r"\$\{?([A-Z][A-Z_]+)\b", LAUNCHER.read_text()))
    assert "RDZV_ENDPOINT" in read
    assert [name for name in sorted(read - {"SLURM_STEP_ID"}) if f"  {name}  " not in told] == []


def test_an_interpreter_without_opencoder_is_refused_by_name(tmp_path: Path, prefix: Path) -> None:  # noqa: F811
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')  # without the packages of any environment
    bare.chmod(0o755)
    done = launch(str(config(tmp_path, prefix)), PYTHON=str(bare))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: PYTHON={bare} ({bare}) has no opencoder: activate")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_the_launch_scripts_are_clean() -> None:
    done = subprocess.run(["shellcheck", *LAUNCHER.parent.iterdir()], capture_output=True, text=True, check=False)
    assert done.stdout == ""
