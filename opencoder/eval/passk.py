"""pass@k without bias, in exact rationals. Source: Chen et al. 2021 (arXiv 2107.03374), section 2.1."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from opencoder.errors import UserError


def pass_at_k(samples: int, passed: int, k: int) -> Fraction:
    """The chance that of k samples drawn without replacement from `samples`, `passed` of which are right, one is right:
    1 − C(n−c, k) / C(n, k). Raises UserError unless 1 ≤ k ≤ samples and 0 ≤ passed ≤ samples."""
    if not 1 <= k <= samples:
        raise UserError(
            f"pass@{k} of {samples} samples: k must lie between 1 and the number of samples; draw more or ask for less"
        )
    if not 0 <= passed <= samples:
        raise UserError(f"{passed} of {samples} samples passed: the number must lie between 0 and {samples}")
    return 1 - Fraction(math.comb(samples - passed, k), math.comb(samples, k))


def mean_pass_at_k(tasks: Sequence[str], verdicts: Mapping[str, Sequence[bool]], k: int) -> Fraction:
    """The mean over all of `tasks` (not over those that happen to have samples: a task without any would raise the mean by vanishing).

    Raises UserError naming the tasks that have fewer than k samples, or verdicts of a task that is not in the list."""
    if not tasks:
        raise UserError("pass@k of no tasks: give at least one")
    strange = sorted(set(verdicts) - set(tasks))
    if strange:
        raise UserError(
            f"verdicts of tasks that are not in the benchmark: {', '.join(strange[:5])}; evaluate one benchmark at a time"
        )
    short = [task for task in tasks if len(verdicts.get(task, ())) < k]
    if short:
        raise UserError(
            f"{len(short)} tasks have fewer than {k} samples ({', '.join(short[:5])}): resume the run to generate them"
        )
    return sum((pass_at_k(len(verdicts[t]), sum(verdicts[t]), k) for t in tasks), Fraction(0)) / len(tasks)
