"""Groups: each collective against what it says, over every group of a mesh; records; what a dry run refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from opencoder.parallel.group import SINGLE, CommunicationError, Group, Records, new_group, world_group
from opencoder.parallel.mesh import AXES, create_mesh, pretend_mesh
from tests.harness import run_ranks


def collectives(rank: int, world: int) -> dict[str, Any]:
    group = create_mesh(tp=world).tp
    mine = torch.arange(2 * world, dtype=torch.float64).view(-1, 1) + 100 * rank
    ring = [torch.full((3,), float(rank)), torch.zeros(3)]
    exchanged = group.start_exchange([(ring[0], (rank + 1) % world)], [(ring[1], (rank - 1) % world)])
    out = torch.zeros(2, 1, dtype=torch.float64)
    return {
        "sum": group.all_reduce(mine.clone()),
        "max": group.all_reduce(mine.clone(), "max"),
        "gathered": group.all_gather(mine),
        "scattered": group.reduce_scatter(mine),
        "scattered into": (group.start_reduce_scatter(mine, out).wait() is out, out),
        "transposed": group.all_to_all(mine),
        "uneven": group.all_to_all_uneven(mine[: sum(range(world))], range(world)),
        "broadcast": group.broadcast(mine.clone(), world - 1),
        "exchanged": exchanged.wait()[0],
        "objects": group.gather_objects({"rank": rank}),
    }


@pytest.mark.parametrize("world", [2, 4])
def test_collectives_give_what_they_say(world: int) -> None:
    inputs = [torch.arange(2 * world, dtype=torch.float64).view(-1, 1) + 100 * r for r in range(world)]
    total = torch.stack(inputs).sum(0)
    for rank, found in enumerate(run_ranks(collectives, world)):
        rows = slice(2 * rank, 2 * rank + 2)
        assert torch.equal(found["sum"], total)
        assert torch.equal(found["max"], inputs[-1])
        assert torch.equal(found["gathered"], torch.cat(inputs))
        assert torch.equal(found["scattered"], total[rows])
        assert found["scattered into"][0]
        assert torch.equal(found["scattered into"][1], total[rows])
        assert torch.equal(found["transposed"], torch.cat([x[rows] for x in inputs]))
        first = sum(range(rank))  # each rank has r rows for rank r
        assert torch.equal(found["uneven"], torch.cat([x[first : first + rank] for x in inputs]))
        assert torch.equal(found["broadcast"], inputs[-1])
        assert torch.equal(found["exchanged"], torch.full((3,), float((rank - 1) % world)))
        assert found["objects"] == [{"rank": r} for r in range(world)]


def test_a_single_rank_needs_no_process_group() -> None:
    x = torch.arange(3.0)
    for result in (SINGLE.all_reduce(x), SINGLE.all_gather(x), SINGLE.reduce_scatter(x), SINGLE.all_to_all(x)):
        assert torch.equal(result, torch.arange(3.0))
    assert torch.equal(SINGLE.all_gather(x, out=torch.zeros(3)), x)
    assert SINGLE.gather_objects(7) == [7]
    SINGLE.barrier()
    assert not SINGLE.records.recent()


def many_small(rank: int, world: int) -> torch.Tensor:
    """1 + 2⁻⁸ + 2⁻⁸ + 2⁻⁸ is lost in bf16 when added one by one."""
    x = torch.full((world,), 2.0**-8 if rank else 1.0, dtype=torch.bfloat16)
    return create_mesh(tp=world).tp.reduce_scatter(x)


def test_16_bit_parts_are_added_in_fp32() -> None:
    expected = torch.tensor([1 + 3 * 2.0**-8]).bfloat16()
    assert expected != 1
    for found in run_ranks(many_small, 4):
        assert torch.equal(found, expected)


def members(rank: int, world: int) -> dict[str, tuple[int, ...]]:
    mesh = create_mesh(tp=2, pp=2, kv_replicas=2)  # and dp 2
    names = (*AXES, "dp_cp", "kv", "embed", "world")
    # The sum over a group of 1 << rank says who took part.
    return {
        name: tuple(r for r in range(world) if int(getattr(mesh, name).all_reduce(torch.tensor(1 << rank))) >> r & 1)
        for name in names
    } | {f"said {name}": getattr(mesh, name).ranks for name in names}


def test_groups_hold_the_ranks_of_their_axes() -> None:
    found = run_ranks(members, 8)
    # rank = pp·4 + dp·2 + tp
    assert found[5] == found[5] | {
        "pp": (1, 5), "dp": (5, 7), "cp": (5,), "tp": (4, 5), "dp_cp": (5, 7), "kv": (4, 5), "embed": (1, 5),
        "world": tuple(range(8)),
    }  # fmt: skip
    for one in found:
        for name in (*AXES, "dp_cp", "kv", "embed", "world"):
            assert one[f"said {name}"] == one[name], name


def first_and_last(rank: int, world: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    mesh = create_mesh(tp=1, pp=4)
    return mesh.embed.ranks, mesh.kv.ranks, mesh.embed.size


def test_embed_joins_the_ends_of_the_pipeline() -> None:
    found = run_ranks(first_and_last, 4)
    assert [embed for embed, _, _ in found] == [(0, 3), (1,), (2,), (0, 3)]
    assert [size for _, _, size in found] == [2, 1, 1, 2]
    assert [kv for _, kv, _ in found] == [(0,), (1,), (2,), (3,)]


def several_axes(rank: int, world: int) -> dict[str, Any]:
    mesh = create_mesh(tp=2, cp=2)  # and dp 2
    found = {axes: mesh.group(axes).ranks for axes in (("dp", "cp"), ("cp",), ("pp", "dp"), ("pp",), AXES)}
    with pytest.raises(ValueError, match="no group over dp, tp"):
        mesh.group(("dp", "tp"))
    with pytest.raises(ValueError, match="no axis 'ep'"):
        mesh.group(("ep",))
    return found


def test_a_group_over_several_axes_leaves_out_those_of_size_1() -> None:
    found = run_ranks(several_axes, 8)[5]  # rank = dp·4 + cp·2 + tp
    assert found == {
        ("dp", "cp"): (1, 3, 5, 7), ("cp",): (5, 7), ("pp", "dp"): (1, 5), ("pp",): (0,), AXES: tuple(range(8)),
    }  # fmt: skip


def records(rank: int, world: int) -> dict[str, Any]:
    mesh = create_mesh(tp=2)
    mesh.records.step = 57
    mesh.tp.all_reduce(torch.zeros(6, dtype=torch.float32))
    handle = mesh.tp.start_all_gather(torch.zeros(2, 5, dtype=torch.float64))
    under_way = [(r.operation, r.sequence) for r in mesh.records.unfinished()]
    handle.wait()
    handle.wait()  # a second time changes nothing
    mesh.dp.all_reduce(torch.zeros(1))
    recent, totals, after = mesh.records.recent(), mesh.records.take(), mesh.records.take()
    return {"under way": under_way, "recent": recent, "totals": totals, "after": after}


def test_collectives_are_recorded_and_counted() -> None:
    for found in run_ranks(records, 4):
        assert found["under way"] == [("all_gather", 2)]
        rows = [(r.sequence, r.group, r.operation, r.shape, r.bytes, r.step) for r in found["recent"]]
        assert rows == [
            (1, "tp", "all_reduce", (6,), 24, 57), (2, "tp", "all_gather", (2, 5), 80, 57), (1, "dp", "all_reduce", (1,), 4, 57),
        ]  # fmt: skip
        assert all(r.finished is not None and r.finished >= r.started for r in found["recent"])
        assert found["totals"][:2] == (3, 108)
        assert found["totals"].blocked_s > 0
        assert found["after"] == (0, 0, 0.0)


@pytest.mark.fast
def test_the_ring_of_records_forgets_the_oldest() -> None:
    ring = Records(capacity=4)
    for i in range(6):
        ring.end(ring.begin("tp", i, "all_reduce", [torch.zeros(1)]), 0.0)
    assert [r.sequence for r in ring.recent()] == [2, 3, 4, 5]
    assert not ring.unfinished()


@pytest.mark.fast
def test_nothing_is_sent_in_a_dry_run() -> None:
    mesh = pretend_mesh(world_size=8, tp=2, pp=2)
    assert (mesh.dp.size, mesh.dp_cp.size, mesh.embed.size, mesh.world.size) == (2, 2, 2, 8)
    with pytest.raises(RuntimeError, match="all_reduce over tp of 2: nothing is sent in a dry run"):
        mesh.tp.all_reduce(torch.zeros(1))


def odd_rows(rank: int, world: int) -> None:
    group: Group = create_mesh(tp=world).tp
    for call in (group.reduce_scatter, group.all_to_all):
        with pytest.raises(ValueError, match="3 rows cannot be split over 2 ranks"):
            call(torch.zeros(3))
    with pytest.raises(ValueError, match=r"all_to_all_uneven: counts \[1, 1\] for 3 rows and 2 ranks"):
        group.all_to_all_uneven(torch.zeros(3), [1, 1])
    with pytest.raises(ValueError, match=r"world size 2 is not a multiple of tp·pp·cp = 3"):
        create_mesh(tp=3)
    with pytest.raises(ValueError, match=r"kv_replicas=3 does not divide tp=2"):
        create_mesh(tp=2, kv_replicas=3)


def test_what_does_not_divide_is_refused() -> None:
    run_ranks(odd_rows, 2)


def waits(rank: int, world: int) -> float:
    """Seconds until a group whose other member never comes gives up."""
    import time

    group = new_group("tp", [[0, 1]], world_group(Records()), timeout_s=1)
    start = time.monotonic()
    if rank == 0:
        with pytest.raises(CommunicationError, match=r"all_reduce #1 over tp at step 0 broke off: .*[Tt]imed out"):
            group.all_reduce(torch.zeros(1))
    else:
        time.sleep(3)
    return time.monotonic() - start


def test_groups_have_the_time_out_they_are_given() -> None:
    assert run_ranks(waits, 2)[0] < 3


def test_what_is_received_is_not_handed_over() -> None:
    records, tensor = Records(), torch.zeros(5, dtype=torch.float64)
    for operation in ("send", "receive", "all_reduce"):
        records.end(records.begin("pp 0→1", 1, operation, [tensor], (0, 1)), 0.0)
    assert records.take()[:2] == (3, 2 * 40)


LEFT_UNWAITED = """
import os, torch
from opencoder.parallel.group import Records, new_group, processes, world_group
with processes("cpu", size=2, timeout_s=60):
    world = world_group(Records())
    other = new_group("other", [[0, 1]], world)
    for group in (world, other):
        for _ in range(20):
            group.start_all_reduce(torch.ones(1_000_000))
names = [open(f"/proc/self/task/{t}/comm").read() for t in os.listdir("/proc/self/task")]
print(world.process_group, sum("gloo" in name for name in names))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in Linux's /proc")
def test_no_thread_of_a_group_is_left_when_the_interpreter_ends() -> None:
    """Else one that still has a tensor aborts the process then."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    done = subprocess.run(
        [*run, sys.executable, "-c", LEFT_UNWAITED], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["None", "0"] * 2
