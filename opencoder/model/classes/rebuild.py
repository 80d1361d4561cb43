"""Keeps the graph of nearest classes young: when it is made anew, by whom, and from which step on all ranks use it.

Schedule and probe are our design (the paper's period could not be found)."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

import torch

from opencoder.errors import Failure
from opencoder.parallel.group import Group, new_group
from opencoder.parallel.records import Records

from .columns import ColumnGraph
from .graph import ProductType, build_graph
from .partition import Partition

PROBE_ROWS = 1024
"""Rows, over all ranks, on which the graph is held against the weights as they are."""
PROBES = 10
"""Of them between two rebuilds: together ten times PROBE_ROWS / N of what a build costs."""
_FAILED, _UNDER_WAY, _DONE = -1, 0, 1


@dataclass(frozen=True)
class BuildOptions:
    """How a graph is made; see `build_graph`."""

    neighbours: int
    dtype: ProductType = "fp32"
    candidate_ratio: float | None = None


@dataclass(frozen=True)
class Schedule:
    """When; steps are numbers of completed optimizer steps."""

    first_step: int
    """The first build begins at this step; until it is done there is no graph, and selection is random."""
    every: int
    """Steps between the beginnings of two builds."""
    probe_recall: float = 0.0
    """Earlier where a probe finds a recall below this."""
    max_age: int | None = None
    """Steps from its snapshot of the weights after which a graph may not be used."""


def background_group(group: Group, world: Group, *, timeout_s: float) -> Group:
    """A second process group with the members of `group`, for builds beside training. Called by all ranks of the world.

    With its own time-out, so that a build in which a rank is lost ends in an error, and its own records, as these are for
    one thread."""
    parts = sorted(set(world.gather_objects(group.ranks)))
    made = new_group(f"{group.name} build", parts, world, timeout_s=timeout_s)
    return replace(made, records=Records())


class GraphKeeper:
    """The graph of a class head. `before_step` is called by all ranks of `everyone` before each optimizer step.

    With `background` (see `background_group`) a build runs in a thread from a copy of the weights, and the ranks agree in each
    step whether all of them are done; the first step in which they are is the first with the new graph, on all of them.
    Without, training waits. Only then is a run that was stopped and resumed the same bit for bit, as how long a thread takes
    is nobody's choice."""

    def __init__(
        self,
        partition: Partition,
        group: Group,
        options: BuildOptions,
        schedule: Schedule,
        *,
        background: Group | None = None,
        everyone: Group | None = None,
        seed: int = 0,
    ) -> None:
        """`everyone`: the ranks that must change graphs at one step, where copies of the classes of `group` are trained over other
        groups too; None: `group` alone."""
        if background is not None and (background.size, background.rank) != (group.size, group.rank):
            raise ValueError(
                f"GraphKeeper: background is rank {background.rank} of {background.size}, group is rank {group.rank} of "
                f"{group.size}; make it with background_group"
            )
        self.partition, self.group, self.options, self.schedule = partition, group, options, schedule
        self.background, self.everyone = background, group if everyone is None else everyone
        self.columns: ColumnGraph | None = None
        """The graph in use; None before the first is done."""
        self.built_at: int | None = None
        """Step of the weights it was made of."""
        self.recall: float | None = None
        """Found by the last probe of it."""
        count = min(-(-PROBE_ROWS // group.size), partition.size(group.size - 1))
        generator = torch.Generator().manual_seed(seed * 65_537 + group.rank)
        self._probe_rows = torch.randperm(partition.size(group.rank), generator=generator)[:count]
        self._probe_lists: torch.Tensor | None = None
        self._build: _Build | None = None

    # ---- each step ----

    def before_step(self, step: int, weight: torch.Tensor) -> bool:
        """Swap, probe and start a build where it is time; weight: (N_r, D), this rank's rows. True: the graph is a new one.

        Raises what the build of this rank raised, Failure where another rank's did or the graph is older than max_age."""
        swapped = self._build is not None and self._swap_when_done(self._build)
        if self._build is None and self._due(step, weight):
            self._build = _Build(self, step, weight)
            if self.background is None:
                self._build.run(weight, self.group)
                self._take(self._build)
                swapped = True
            else:
                self._build.start(weight, self.background)
        self._check_age(step)
        return swapped

    def _due(self, step: int, weight: torch.Tensor) -> bool:
        """The same answer on all ranks."""
        if self.built_at is None:
            return step >= self.schedule.first_step
        age = step - self.built_at
        if age >= self.schedule.every:
            return True
        if age <= 0 or age % max(1, self.schedule.every // PROBES):
            return False
        self.recall = self.probe(weight)
        return self.recall < self.schedule.probe_recall

    def _swap_when_done(self, build: _Build) -> bool:
        """One small collective a step while a build is under way."""
        status = torch.tensor(build.status(), device=build.device)
        agreed = int(self.everyone.all_reduce(status, "min"))
        if agreed == _FAILED:
            self._build = None
            if build.error is not None:
                raise build.error
            failure = Failure(
                f"the graph of classes begun at step {build.step} was not built: another rank of "
                f"{self.everyone.name or 'the group'} tells why"
            )
            failure.told_elsewhere = True
            raise failure
        if agreed == _DONE:
            self._take(build)
        return agreed == _DONE

    def close(self) -> None:
        """Wait for a build that is under way, whose collectives would break off if this process ended, and give it up. Raises
        what it raised. Called by all ranks once the last step is done."""
        build, self._build = self._build, None
        if build is not None:
            build.join()
            if build.error is not None:
                raise build.error

    def _take(self, build: _Build) -> None:
        assert build.columns is not None
        assert build.probe_lists is not None
        self.columns, self._probe_lists, self.built_at = build.columns, build.probe_lists, build.step
        self.recall, self._build = None, None

    def _check_age(self, step: int) -> None:
        if self.schedule.max_age is None:
            return
        since = self.schedule.first_step if self.built_at is None else self.built_at
        if step - since > self.schedule.max_age:
            what = "there is none yet" if self.columns is None else f"it is of step {self.built_at}"
            raise Failure(
                f"the graph of classes is {step - since} steps behind at step {step} ({what}); "
                f"model.head.rebuild.max_age={self.schedule.max_age} allows no more: raise it, or set "
                f"model.head.rebuild.every={self.schedule.every} lower"
            )

    # ---- how good it is ----

    def probe(self, weight: torch.Tensor) -> float:
        """Share of the true neighbours, by the weights as they are, that the graph has, over the probe rows of all ranks; a
        class itself does not count. Called by all ranks."""
        if self._probe_lists is None:
            raise ValueError("GraphKeeper.probe: there is no graph yet")
        lists = self._probe_lists[:, 1:]
        found = build_graph(weight, self.partition, self.group, **vars(self.options), query_rows=self._probe_rows)[
            :, 1:
        ]
        both = torch.cat([lists, found], 1).sort(dim=1).values
        counts = torch.tensor([int((both.diff(dim=1) == 0).sum()), lists.numel()], device=weight.device)
        hits, of = self.everyone.all_reduce(counts).tolist()
        return hits / of if of else 1.0

    def metrics(self, step: int) -> dict[str, float]:
        """graph_age in steps and probe_recall, each where it is known."""
        found = {}
        if self.built_at is not None:
            found["graph_age"] = float(step - self.built_at)
        if self.recall is not None:
            found["probe_recall"] = self.recall
        return found

    # ---- checkpoints ----

    def lists(self) -> torch.Tensor | None:
        """The graph as a checkpoint stores it, beside `built_at`: int32 (N_r, K), placed as the weight is, so that it can be
        loaded on another number of ranks. Called by all ranks."""
        return None if self.columns is None else self.columns.to_rows(self.partition, self.group)

    def load(self, lists: torch.Tensor, built_at: int) -> None:
        """Go on with a stored graph; lists: this rank's rows of it. Called by all ranks."""
        self.columns = ColumnGraph.from_rows(lists, self.partition, self.group)
        self._probe_lists, self.built_at = lists[self._probe_rows.to(lists.device)], built_at
        self.recall, self._build = None, None


class _Build:
    """One build, in this thread or in one of its own."""

    def __init__(self, keeper: GraphKeeper, step: int, weight: torch.Tensor) -> None:
        self.keeper, self.step, self.device = keeper, step, weight.device
        self.columns: ColumnGraph | None = None
        self.probe_lists: torch.Tensor | None = None
        self.error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def run(self, weight: torch.Tensor, group: Group) -> None:
        keeper = self.keeper
        lists = build_graph(weight, keeper.partition, group, **vars(keeper.options))
        self.probe_lists = lists[keeper._probe_rows.to(lists.device)]
        self.columns = ColumnGraph.from_rows(lists, keeper.partition, group)

    def start(self, weight: torch.Tensor, group: Group) -> None:
        """From a copy of the weights as they are now."""
        snapshot = weight.detach().clone()
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # the copy is there before another stream reads it
        group.records.step = self.step  # for messages
        # A daemon: a rank that ends with an error does not wait for it.
        self._thread = threading.Thread(target=self._in_thread, args=(snapshot, group), name="class graph", daemon=True)
        self._thread.start()

    def _in_thread(self, snapshot: torch.Tensor, group: Group) -> None:
        try:
            if self.device.type != "cuda":
                self.run(snapshot, group)
                return
            # Beside the steps' own stream. Done means that it has come to its end.
            stream = torch.cuda.Stream(self.device)
            with torch.cuda.device(self.device), torch.cuda.stream(stream):
                self.run(snapshot, group)
            stream.synchronize()
        except BaseException as error:  # the main thread raises it in its next step
            self.error = error

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def status(self) -> int:
        """_FAILED, _UNDER_WAY or _DONE."""
        if self._thread is not None and self._thread.is_alive():
            return _UNDER_WAY
        return _DONE if self.error is None else _FAILED
