"""`opencoder bench-corpus`: speed per core of MinHash and of fuzzy dedup, text to groups, beside datasketch, of signals with
verdicts, and of decontamination; on the Python standard library's source, the signals also on the files given with --input.

One process, one thread; the sides alternate and the best of each counts. datasketch's time is given with and without
its shingling, which it leaves to Python. `--only build` measures the whole of build-corpus (opencoder.tools.bench_build)."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence

from opencoder.console import Parser, run
from opencoder.files import write_json
from opencoder.tools import bench_build, bench_signals
from opencoder.tools.bench_decontaminate import decontaminate_rates
from opencoder.tools.bench_dedup import NGRAM, dedup_rates, minhash_rates

PARTS = ("minhash", "dedup", "signals", "decontaminate", "build")
"""`build` has to be asked for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = Parser(
        "bench-corpus",
        "Speed per core of MinHash and dedup beside datasketch 2, of signals and verdicts, and of decontamination.",
    )
    parser.add_argument("--only", choices=PARTS, help="one part instead of all")
    parser.add_argument("--num-perm", type=int, default=2048, help="slots of a signature")
    parser.add_argument(
        "--megabytes", type=float, default=2.0, help="text for MinHash, decontamination, and datasketch throughout"
    )
    parser.add_argument("--dedup-megabytes", type=float, default=20.0, help="text for our dedup")
    parser.add_argument(
        "--input", nargs="+", help="folders or files for signals and builds; default: the standard library"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="of the builds; --only build")
    parser.add_argument("--folder", help="where the builds write, with as much room as the input; --only build")
    parser.add_argument("--signal-megabytes", type=float, default=20.0, help="text for the signals")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each; the best counts")
    parser.add_argument("--json", help="file for the numbers")
    args = parser.parse_args(argv)

    from opencoder.native import text_engine

    engine = "C++" if text_engine() is not None else "no C++ engine: datasketch and Python"
    result: dict[str, object] = {"engine": engine, "num_perm": args.num_perm, "megabytes": args.megabytes}
    if args.only in (None, "minhash"):
        rates = minhash_rates(args.megabytes, args.num_perm, args.rounds)
        print(f"MinHash, text to {args.num_perm} slots, {NGRAM}-grams, per core ({engine}); equal signatures")
        print_rates(rates)
        result["minhash_mb_per_s"] = rates
    if args.only in (None, "dedup"):
        rates, facts = dedup_rates(args.dedup_megabytes, args.megabytes, args.rounds)
        print(
            f"fuzzy dedup, text to groups, 16 × 128, per core ({engine}): {facts['files']:.0f} files, "
            f"{facts['megabytes']:.1f} MB, {100 * facts['share_in_groups']:.1f} % of them in groups; equal groups"
        )
        print_rates(rates)
        result |= {"dedup_mb_per_s": rates, "dedup_set": facts}
    if args.only in (None, "signals"):
        inputs = args.input or [sysconfig.get_paths()["stdlib"]]
        rows = bench_signals.measure(bench_signals.read_files(inputs, args.signal_megabytes), args.rounds)
        print(bench_signals.table(rows))
        result["signals"] = rows
    if args.only in (None, "decontaminate"):
        rates, against = decontaminate_rates(args.megabytes, args.rounds)
        counts = f"{against['files']} files against {against['tasks']} tasks, {against['ngrams']} n-grams"
        print(f"decontamination, per core: {counts}; equal matches")
        print_rates(rates)
        result |= {"decontaminate_mb_per_s": rates, "decontaminate_set": against}
    if args.only == "build":
        found = bench_build.measure(args.input or [sysconfig.get_paths()["stdlib"]], args.workers, args.folder)
        print(bench_build.table(found))
        result["build"] = found
    if args.json:
        write_json(args.json, result)
    return 0


def print_rates(rates: dict[str, float]) -> None:
    """One line per side, with its ratio to the peer where there is one."""
    for name, rate in rates.items():
        peer = rates.get(name.replace("ours", "datasketch"))
        ratio = f"{rate / peer:>8.1f}× datasketch" if peer and "ours" in name else ""
        print(f"{name:<40}{rate:>9.2f} MB/s{ratio}")


if __name__ == "__main__":
    run(main)
