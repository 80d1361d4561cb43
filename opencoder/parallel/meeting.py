"""A store of their own for the ranks that torchrun has started this time.

torchrun 2.5 and later hands every generation of workers the same store of its agent (TORCHELASTIC_USE_AGENT_STORE), without a
prefix: workers started after a fault read the addresses that the dead ones left in it, and wait for those in vain
(pytorch issue 135712; seen with torch 2.13 and gloo: both new workers wait in init_process_group until the time-out).
TORCHELASTIC_RESTART_COUNT is no prefix either: each agent counts for itself."""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from opencoder.errors import Failure

POLL_S = (0.02, 0.5)
"""Between two looks, at first and at most: thousands of ranks that wait must not keep the store busy."""


def store_of_torchrun(*, timeout_s: float) -> Store | None:
    """The store at MASTER_ADDR:MASTER_PORT under a prefix that no earlier workers used; None where torchrun gives each
    generation a store of its own, or did not start this process. Raises Failure as `agree_on_prefix` does."""
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
    store = TCPStore(
        env["MASTER_ADDR"], int(env["MASTER_PORT"]), size, is_master=False, timeout=timedelta(seconds=timeout_s)
    )
    return PrefixStore(agree_on_prefix(store, rank, size, timeout_s=timeout_s), store)


def agree_on_prefix(store: Store, rank: int, size: int, *, timeout_s: float) -> str:
    """A new name, the same on all ranks, whatever `store` holds from before.

    Every other rank leaves a random word, rank 0 answers it with its name of this time, and the rank says that it has read it:
    a word left by a dead rank is answered too, but nobody confirms. Raises Failure after `timeout_s`, naming ranks that did
    not come."""
    deadline = time.monotonic() + timeout_s
    if rank > 0:
        word = uuid.uuid4().hex
        store.set(f"opencoder/word/{rank}", word)
        _wait_for(store, f"opencoder/answer/{word}", deadline, timeout_s)
        name = store.get(f"opencoder/answer/{word}").decode()
        store.set(f"opencoder/read/{name}/{rank}", "")
        return name
    name = uuid.uuid4().hex
    missing, poll_s = list(range(1, size)), POLL_S[0]
    while missing:
        for other in missing:
            if store.check([f"opencoder/word/{other}"]):
                store.set(f"opencoder/answer/{store.get(f'opencoder/word/{other}').decode()}", name)
        missing = [other for other in missing if not store.check([f"opencoder/read/{name}/{other}"])]
        if missing and time.monotonic() > deadline:
            raise Failure(
                f"of {size} ranks, {missing} did not come within {timeout_s:.0f} s: look at the output of their nodes"
            )
        time.sleep(poll_s)
        poll_s = min(1.5 * poll_s, POLL_S[1])
    return name


def _wait_for(store: Store, key: str, deadline: float, timeout_s: float) -> None:
    # Not store.wait(): it blocks where no signal is seen.
    poll_s = POLL_S[0]
    while not store.check([key]):
        if time.monotonic() > deadline:
            raise Failure(f"rank 0 did not answer within {timeout_s:.0f} s: look at the output of its node")
        time.sleep(poll_s)
        poll_s = min(1.5 * poll_s, POLL_S[1])
