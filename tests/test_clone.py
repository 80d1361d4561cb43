"""A clone as working directory: the folder `kernels` must not be taken for the package of that name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python(*args: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=300, **kwargs)


IMPORTS = (
    "import opencoder.kernels as K; assert callable(K.rms_norm)\n"
    "from transformers import LlamaForCausalLM\n"
    "import kernels; assert not hasattr(kernels, 'rms_norm'), 'the folder handed its names on'\n"
)


@pytest.mark.parametrize("args", [("-m", "opencoder.train", "--help"), ("-c", IMPORTS)], ids=["train-help", "imports"])
def test_works_with_the_clone_as_working_directory(args: tuple[str, ...]) -> None:
    done = python(*args, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_wheel_carries_real_copies_and_works_from_the_clone(tmp_path: Path) -> None:
    target = tmp_path / "installed"
    source = tmp_path / "source"
    copy = subprocess.run(
        f"mkdir {source} && git ls-files -co --exclude-standard -z | xargs -0 cp -a --parents -t {source}",
        shell=True, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert copy.returncode == 0, copy.stderr
    pip = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(target), str(source)]
    done = python(*pip, env={**_environment(), "OPENCODER_NO_EXT": "1"})
    assert done.returncode == 0, done.stderr
    for name in ("kernels", "tools"):
        assert (target / "opencoder" / name / "__init__.py").is_file()
        assert not (target / "opencoder" / name).is_symlink()
    # -P keeps the clone itself off sys.path[0], so that opencoder comes from the wheel; kernels/ is put back behind it.
    check = f"import sys; sys.path.append({str(ROOT)!r})\n" + IMPORTS
    check += f"import opencoder; assert opencoder.__file__.startswith({str(target)!r}), opencoder.__file__\n"
    done = python("-P", "-c", check, cwd=ROOT, env={**_environment(), "PYTHONPATH": str(target)})
    assert done.returncode == 0, done.stderr
    done = python("-P", "-m", "opencoder.train", "--help", cwd=ROOT, env={**_environment(), "PYTHONPATH": str(target)})
    assert done.returncode == 0, done.stderr


def _environment() -> dict[str, str]:
    import os

    return dict(os.environ)


def install(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Install a copy of the sources with a compiler that always fails."""
    source = tmp_path / "source"
    subprocess.run(
        f"mkdir {source} && git ls-files -co --exclude-standard -z | xargs -0 cp -a --parents -t {source}",
        shell=True, cwd=ROOT, check=True,
    )  # fmt: skip
    pip = [
        "-m",
        "pip",
        "install",
        "-v",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(tmp_path / "installed"),
        str(source),
    ]
    return python(
        *pip, env={**_environment(), "CC": "false", "CXX": "false", "OPENCODER_REQUIRE_EXT": "0", **environment}
    )


def test_without_a_compiler_it_installs_runs_and_says_what_is_missing(tmp_path: Path) -> None:
    done = install(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "was not built" in done.stdout + done.stderr
    assert not list((tmp_path / "installed" / "opencoder").glob("*.so"))
    code = (
        # The editable install of this environment would lend its own libraries.
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import logging; logging.basicConfig()\n"
        "import torch\nfrom opencoder import kernels as K\nfrom opencoder.corpus.minhash import signatures\n"
        "for _ in range(3): K.rms_norm(torch.ones(2, 4), torch.ones(4), eps=1e-5); signatures(['a b c'], num_perm=4, ngram=2)"
    )
    ran = python("-P", "-c", code, cwd=tmp_path, env={**_environment(), "PYTHONPATH": str(tmp_path / "installed")})
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("apt-get install g++") == 2, "once for each library"


def test_a_required_extension_that_does_not_build_is_an_error(tmp_path: Path) -> None:
    assert install(tmp_path, OPENCODER_REQUIRE_EXT="1").returncode != 0
