"""Fixtures of several modules: processes that tests share, and both versions of MinHash."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest

from opencoder.corpus import build, minhash
from opencoder.corpus.engine import LocalExecutor, make_executor
from opencoder.corpus_config import EngineConfig
from opencoder.native import text_engine


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], LocalExecutor]]:
    """Number of workers → an executor of that many, which lives on from test to test."""
    executors: dict[int, LocalExecutor] = {}

    def executor_of(workers: int) -> LocalExecutor:
        if workers not in executors:
            executors[workers] = LocalExecutor(workers)
        return executors[workers]

    yield executor_of
    for executor in executors.values():
        executor.close()


@pytest.fixture(scope="session")
def two(pool: Callable[[int], LocalExecutor]) -> LocalExecutor:
    """An executor of two workers."""
    return pool(2)


@pytest.fixture(scope="session", autouse=True)
def builds_share_their_workers(pool: Callable[[int], LocalExecutor]) -> Iterator[None]:
    """A worker takes two seconds to start, a build of a few files a quarter of one. Builds by command start their own."""

    def make(config: EngineConfig, *, workers: int) -> AbstractContextManager[object]:
        if config.executor != "local" or config.memory_per_worker_mb is not None:
            return make_executor(config, workers=workers)
        return nullcontext(pool(workers))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "make_executor", make)
        yield


@pytest.fixture(params=["cpp", "fallback"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With and without the C++ text engine."""
    if request.param == "cpp" and text_engine() is None:
        pytest.skip("the C++ text engine was not built")
    if request.param == "fallback":
        monkeypatch.setattr(minhash, "_engine", lambda: None)
    return str(request.param)
