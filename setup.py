"""Builds the two C++ libraries; everything else about the package stands in pyproject.toml.

csrc/text -> opencoder/_text.*.so    text engine, pybind11, no torch
csrc/ops  -> opencoder/_ops.*.so     CPU operators on torch's stable ABI, loaded with torch.ops.load_library

Neither is needed to install or to run: without a compiler the package falls back to its reference implementations and
says so once. OPENCODER_NO_EXT=1 skips both; OPENCODER_REQUIRE_EXT=1 makes a failed build an error (CI sets it).

Nothing is built for CUDA, with or without nvcc: the Triton kernels need no build, and what they leave out, matrix products
and dense attention, is cuBLAS's and cuDNN's."""

import glob
import os
import subprocess
import sys
import sysconfig
import tempfile

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SKIP = os.environ.get("OPENCODER_NO_EXT") == "1"
REQUIRE = os.environ.get("OPENCODER_REQUIRE_EXT") == "1"
# Oldest torch whose stable ABI we use: one binary for it and everything newer.
TORCH_ABI = "0x020b000000000000"  # 2.11


# For the vector loops of csrc/ops. Without the second and third, the compiler must assume that any operation may trap or
# set errno, and masks or splits the loops; the last keeps it from copying divisions to both sides of a clamp. None changes
# a result. A compiler that does not know one builds without it.
LOOP_FLAGS = ["-mprefer-vector-width=512", "-fno-trapping-math", "-fno-math-errno", "-fno-tree-pre", "-fopenmp-simd"]


def known_flags(candidates: list[str]) -> list[str]:
    """Those that the C++ compiler takes."""
    compiler = [*(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "empty.cpp")
        with open(source, "w") as file:
            file.write("int main() { return 0; }\n")
        for flag in candidates:
            argv = [*compiler, "-Werror", flag, "-c", source, "-o", os.path.join(folder, "empty.o")]
            try:
                done = subprocess.run(argv, capture_output=True, check=False)
            except OSError:
                return []  # no compiler: the build itself will say so
            if done.returncode == 0:
                found.append(flag)
    return found


def text_extension() -> Extension:
    import pybind11

    return Extension(
        "opencoder._text",
        sorted(glob.glob("csrc/text/*.cpp")),
        include_dirs=[pybind11.get_include()],
        depends=glob.glob("csrc/text/*.h"),
        extra_compile_args=["-O3", "-std=c++20", "-fvisibility=hidden", "-g0"],
        language="c++",
    )


def ops_extension() -> Extension:
    from torch.utils.cpp_extension import include_paths, library_paths

    return Extension(
        "opencoder._ops",
        sorted(glob.glob("csrc/ops/*.cpp")),
        include_dirs=include_paths(),
        library_dirs=library_paths(),
        libraries=["torch_cpu"],  # torch loads its libraries privately: their C functions must be asked for
        depends=glob.glob("csrc/ops/*.h"),
        extra_compile_args=[
            "-O3",
            "-std=c++20",
            "-g0",
            *known_flags(LOOP_FLAGS),
            f"-DTORCH_TARGET_VERSION={TORCH_ABI}",
        ],
        language="c++",
    )


class OptionalBuild(build_ext):
    """Builds what can be built. A failure is told, and is fatal only with OPENCODER_REQUIRE_EXT=1."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or len(self.extensions)  # the libraries at the same time: minutes each

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            self.give_up("the C++ extensions", error)

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            self.give_up(ext.name, error)

    def copy_extensions_to_source(self) -> None:
        # Editable installs copy each library into the tree; one that did not build is simply absent.
        built = [ext for ext in self.extensions if os.path.exists(self.get_ext_fullpath_in_build(ext))]
        self.extensions, everything = built, self.extensions
        super().copy_extensions_to_source()
        self.extensions = everything

    def get_ext_fullpath_in_build(self, ext: Extension) -> str:
        return os.path.join(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name)))

    def give_up(self, what: str, error: Exception) -> None:
        if REQUIRE:
            raise error
        print(
            f"opencoder: {what} was not built ({error}); the reference implementations are used instead. To build it, "
            "install a C++20 compiler (Debian: apt-get install g++), pybind11 and torch, then reinstall with "
            "`pip install --no-build-isolation -e .`",
            file=sys.stderr,
        )


def extensions() -> list[Extension]:
    """The libraries whose build requirements can be imported."""
    if SKIP:
        for stale in glob.glob("opencoder/_text*.so") + glob.glob("opencoder/_ops*.so"):
            os.remove(stale)
        return []
    found = []
    for make in (text_extension, ops_extension):
        try:
            found.append(make())
        except ImportError as error:
            if REQUIRE:
                raise
            print(f"opencoder: {make.__name__} skipped: {error}; reinstall with --no-build-isolation", file=sys.stderr)
    return found


setup(ext_modules=extensions(), cmdclass={"build_ext": OptionalBuild})
