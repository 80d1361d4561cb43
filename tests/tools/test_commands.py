"""The commands as a user starts them: help, exit codes, and the way from a trained model to text and back."""

from __future__ import annotations

import importlib
import io
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml

from opencoder.data import tokenizer as tok
from opencoder.data.preprocess import Job, preprocess
from opencoder.tools.cli import COMMANDS
from opencoder.train.metrics import read_rows

ROOT = Path(__file__).parents[2]
TEXTS = [f"def function_{i}(value):\n    return value + {i}\n" for i in range(300)]


def opencoder(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "opencoder.tools.cli", *args], capture_output=True, text=True, check=False
    )


def called(command: str, *args: str) -> str:
    """What a command prints, called in this process: starting one with torch and transformers takes seconds."""
    with redirect_stdout(io.StringIO()) as out:
        assert importlib.import_module(COMMANDS[command][0]).main(list(args)) == 0
    return out.getvalue()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_options_and_exits_0(command: str) -> None:
    done = opencoder(command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: opencoder {command}")


def test_each_file_is_the_same_command() -> None:
    module = COMMANDS["verify-dataset"][0].rsplit(".", 1)[1]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / f"{module}.py"), "/absent/d"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == opencoder("verify-dataset", "/absent/d").stderr


def test_unknown_commands_and_options_are_one_line_with_status_2() -> None:
    done = opencoder("preproces")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "did you mean `preprocess`" in done.stderr
    done = opencoder("verify-dataset", "--fast")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "convert" in opencoder("--help").stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, a dataset, a short run and its export."""
    root = tmp_path_factory.mktemp("commands")
    (root / "docs.jsonl").write_text("".join(f'{{"text": {text!r}}}\n'.replace("'", '"') for text in TEXTS))
    tok.save(tok.train(TEXTS, vocab_size=300), root / "tokenizer")
    preprocess(Job((str(root / "docs.jsonl"),), str(root / "tokenizer")), root / "data")
    config = {
        "run_dir": str(root / "run"),
        "model": {"layers": 2, "hidden_size": 64, "heads": 4, "ffn_size": 96, "vocab_size": 300, "max_seq_len": 128},
        "data": {"tokenizer": str(root / "tokenizer"), "blend": [{"prefix": str(root / "data")}], "seq_len": 64},
        "train": {"steps": 30, "global_batch_size": 8, "micro_batch_size": 8, "threads": 2},
        "optim": {"lr": 1e-2, "warmup_steps": 3},
        "log": {"every": 10, "tensorboard": False},
    }
    (root / "train.yaml").write_text(yaml.safe_dump(config))
    for args in (
        ("train", str(root / "train.yaml")),
        ("convert", "--from", "native", "--to", "hf", "--input", str(root / "run"), "--output", str(root / "hf")),
    ):
        done = opencoder(*args)
        assert done.returncode == 0, done.stdout + done.stderr
    called("convert", "--from", "hf", "--to", "native", "--input", str(root / "hf"), "--output", str(root / "native"))
    return root


def test_text_is_the_same_from_every_form_of_the_model(folder: Path) -> None:
    def args(name: str) -> tuple[str, ...]:
        return ("generate", "--model", str(folder / name), "--prompt", "def function_", "--max-new-tokens", "12")

    done = opencoder(*args("run"))
    assert done.returncode == 0, done.stderr
    (text,) = {done.stdout, *(called(*args(name)) for name in ("run", "hf", "native"))}
    assert text.startswith("def function_")
    assert "(value):" in text


def test_sampling_depends_on_the_seed_and_chat_uses_the_template(folder: Path) -> None:
    base = (
        "generate",
        "--model",
        str(folder / "hf"),
        "--prompt",
        "def",
        "--max-new-tokens",
        "8",
        "--temperature",
        "1.5",
    )
    a, b, c = (called(*base, "--seed", seed) for seed in ("1", "1", "2"))
    assert a == b != c
    assert "user\ndef" in called(*base, "--chat")


def test_an_exported_model_starts_another_run(folder: Path) -> None:
    done = opencoder(
        "train",
        str(folder / "train.yaml"),
        f"checkpoint.load={folder / 'hf'}",
        f"run_dir={folder / 'tuned'}",
        "train.steps=5",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, before = read_rows(folder / "tuned" / "metrics.jsonl")[0], read_rows(folder / "run" / "metrics.jsonl")
    assert first["loss"] < 0.5 * before[0]["loss"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (
            ("convert", "--from", "hf", "--to", "hf", "--input", "x", "--output", "y"),
            "one must be hf and the other native",
        ),
        (
            ("convert", "--from", "hf", "--to", "native", "--input", "/absent", "--output", "y"),
            "/absent is not a folder",
        ),
        (("generate", "--model", "/absent", "--prompt", "x"), "/absent is not a folder"),
        (("train-tokenizer", "--input", "/absent", "--output", "y", "--vocab-size", "300"), "/absent does not exist"),
        (
            ("preprocess", "--input", "/absent", "--tokenizer", "x", "--output-prefix", "y", "--workers", "0"),
            "must be at least 1",
        ),
        (("explain", "/absent", "x"), "no finished corpus"),
    ],
)
def test_mistakes_are_one_line_with_status_2(args: tuple[str, ...], says: str) -> None:
    done = opencoder(*args)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
