"""How programs of each language are built and run, and how a test of MultiPL-E is made to fail."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from .sandbox.limits import Limits

COMPILED = Limits(
    wall_s=60, cpu_s=30, memory_mib=4096, tree_memory_mib=4096, processes=64, file_mib=128, disk_mib=256, open_files=256
)
VIRTUAL = replace(COMPILED, memory_mib=1 << 16, processes=128)
"""For node, the JVM and Go, which reserve far more address space than they use."""
JAVA = ("-XX:+UseSerialGC", "-Xmx512m", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData")

TUPLES = "/usr/share/java/javatuples.jar"
"""What MultiPL-E's Java programs import (Debian: libjavatuples-java)."""
CLASSES = f".:{TUPLES}"


@dataclass(frozen=True)
class Language:
    """One language. Commands run in the folder of the file."""

    file: str
    steps: Sequence[Sequence[str]]
    spoil: Callable[[str], str]
    """A test that must fail, made of one that may pass."""
    limits: Limits = COMPILED
    remove: Sequence[str] = ()
    """Files that a compiled program needs no more."""


def before_end(statement: str, end: str = r"\}\s*$") -> Callable[[str], str]:
    """Puts `statement` before the last match of `end`. Raises ValueError where there is none."""

    def spoil(test: str) -> str:
        found = list(re.finditer(end, test))
        if not found:
            raise ValueError(f"the test does not end with {end}: no failing test can be made of it")
        return f"{test[: found[-1].start()]}{statement}\n{test[found[-1].start() :]}"

    return spoil


LANGUAGES: dict[str, Language] = {
    "javascript": Language(
        "main.js",
        [["node", "main.js"]],
        before_end("assert.deepEqual([1], [2]);", r"\}\s*test\(\);\s*$"),
        VIRTUAL,
    ),
    "c++": Language(
        "main.cpp",
        [["g++", "-std=c++17", "-O1", "-o", "main", "main.cpp"], ["./main"]],
        before_end("assert(1 == 2);"),
        remove=["main.cpp"],
    ),
    "java": Language(
        "Problem.java",
        [
            ["javac", *(f"-J{option}" for option in JAVA), "-cp", CLASSES, "-encoding", "UTF-8", "Problem.java"],
            ["java", *JAVA, "-cp", CLASSES, "-ea", "Problem"],
        ],
        before_end("assert 1 == 2;", r"\}\s*\}\s*$"),
        VIRTUAL,
        ["Problem.java"],
    ),
    "go": Language("main_test.go", [["go", "test", "main_test.go"]], before_end('t.Errorf("must fail")'), VIRTUAL),
    "rust": Language(
        "main.rs", [["rustc", "-o", "main", "main.rs"], ["./main"]], before_end("assert_eq!(1, 2);"), remove=["main.rs"]
    ),
    "bash": Language("main.sh", [["bash", "main.sh"]], lambda test: test + '\n[[ "1" = "2" ]]\n'),
}
MULTIPL_E = {
    "js": "javascript",
    "cpp": "c++",
    "java": "java",
    "go": "go",
    "go_test.go": "go",
    "rs": "rust",
    "sh": "bash",
}
"""Names of languages in MultiPL-E's files."""


def missing(language: str) -> str:
    """Why programs of a language cannot run here; empty if they can."""
    if language == "python":
        return ""
    if language not in LANGUAGES:
        return f"{language} is not supported: allowed are python, {', '.join(LANGUAGES)}"
    absent = [
        step[0] for step in LANGUAGES[language].steps if not step[0].startswith("./") and not shutil.which(step[0])
    ]
    return f"no {', '.join(absent)} on this machine" if absent else ""


@cache
def toolchain_folders() -> tuple[str, ...]:
    """Folders of compilers outside /usr that the sandbox must show: Rust's toolchain (behind rustup's wrapper) and Go's."""
    folders = []
    for command in (["rustc", "--print", "sysroot"], ["go", "env", "GOROOT"]):
        if shutil.which(command[0]):
            told = subprocess.run(command, capture_output=True, text=True, timeout=60)
            folder = told.stdout.strip()
            if told.returncode == 0 and folder and not folder.startswith("/usr") and Path(folder).is_dir():
                folders.append(folder)
    return tuple(folders)


def environment() -> dict[str, str]:
    """Where programs find the compilers."""
    folders = [f"{folder}/bin" for folder in toolchain_folders()]
    return {"PATH": ":".join([*folders, "/usr/local/bin", "/usr/bin", "/bin"])}
