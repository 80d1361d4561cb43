"""The console command `opencoder`: finds the subcommand's file and runs it."""

from __future__ import annotations

import importlib
import sys
from typing import NoReturn

from opencoder import __version__
from opencoder.console import run
from opencoder.errors import nearest

# subcommand: (module, what it does). Modules are imported only when asked for, so that `opencoder --help` is quick.
COMMANDS: dict[str, tuple[str, str]] = {
    "build-corpus": ("opencoder.tools.build_corpus", "sources to clean and dropped documents with a report"),
    "compute-signals": ("opencoder.tools.compute_signals", "every quality signal and verdict of each file, as a table"),
    "explain": ("opencoder.tools.explain", "why one file was kept or dropped"),
    "decontaminate": ("opencoder.tools.decontaminate", "find and drop documents that hold tasks of benchmarks"),
    "run-tasks": ("opencoder.tools.run_tasks", "one element of a job array does its share of a corpus build"),
    "train-tokenizer": ("opencoder.tools.train_tokenizer", "train a byte-level BPE tokenizer"),
    "preprocess": ("opencoder.tools.preprocess_data", "documents to a tokenised .bin/.idx dataset"),
    "write-classification": ("opencoder.tools.write_classification", "labelled samples to a memory-mapped dataset"),
    "verify-dataset": ("opencoder.tools.verify_dataset", "check the integrity of a .bin/.idx dataset"),
    "train": ("opencoder.train.__main__", "train a model, or check a configuration with --dry-run"),
    "convert": ("opencoder.tools.convert_checkpoint", "checkpoints to and from Hugging Face format"),
    "export-classes": ("opencoder.tools.export_classes", "encoder and class matrix of a checkpoint, to search in"),
    "retrieve": ("opencoder.tools.retrieve", "the classes that samples go with best"),
    "generate": ("opencoder.tools.generate", "text from a native or Hugging Face checkpoint"),
    "make-sft": ("opencoder.tools.make_sft", "conversations for tuning out of real Python code"),
    "preprocess-sft": ("opencoder.tools.preprocess_sft", "conversations to a tokenised dataset for tuning"),
    "sft-ablation": ("opencoder.tools.sft_ablation", "tuning in stages against tuning on a mix, at small scale"),
    "evaluate": (
        "opencoder.tools.evaluate",
        "benchmarks of code in a sandbox, held-out loss, checkpoints as they appear",
    ),
    "check-triton": ("opencoder.tools.check_triton", "compile the Triton kernels for GPUs without one"),
    "tune-kernels": ("opencoder.tools.tune_kernels", "find launch settings of the Triton kernels"),
    "demo": ("opencoder.tools.demo", "the whole path on the Python standard library, in minutes"),
    "bench-kernels": ("opencoder.tools.bench_kernels", "the kernels beside eager torch, torch.compile and others"),
    "bench-train": ("opencoder.tools.bench_train", "training speed and memory beside transformers"),
    "bench-corpus": ("opencoder.tools.bench_corpus", "signals, MinHash and dedup beside datasketch, decontamination"),
    "bench-dataset": ("opencoder.tools.bench_dataset", "random reads beside megatron-core, building indices, start-up"),
    "bench-checkpoint": ("opencoder.tools.bench_checkpoint", "saving and loading beside the disk's own rate"),
    "bench-export": ("opencoder.tools.bench_export", "time and memory of an export to Hugging Face format"),
    "bench-estimate": ("opencoder.tools.bench_estimate", "the estimate of --dry-run beside the memory of real steps"),
    "fetch-sources": ("opencoder.tools.fetch_sources", "real code from Debian and PyPI to measure the pipeline on"),
    "bench-sources": ("opencoder.tools.bench_sources", "reading speed of folders, archives and repositories"),
    "bench-lexing": ("opencoder.tools.bench_lexing", "lexers beside Pygments, scanners and parsers of the signals"),
    "bench-engine": ("opencoder.tools.bench_engine", "time of the task engine per task"),
    "bench-hostile": ("opencoder.tools.bench_hostile", "time against length for texts made to be slow"),
    "bench-evaluate": ("opencoder.tools.bench_evaluate", "time of the sandbox beside that of the programs in it"),
    "bench-classification": ("opencoder.tools.bench_classification", "full, random and KNN softmax over many classes"),
    "plan-classification": ("opencoder.tools.plan_classification", "memory and arithmetic of a class head, computed"),
    "bench-preprocess": ("opencoder.tools.bench_preprocess", "tokenising speed beside a loop over HF tokenizers"),
}


def usage() -> str:
    """The text of `opencoder --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {does}" for name, (_, does) in COMMANDS.items()]
    return "usage: opencoder COMMAND [options]   (opencoder COMMAND --help shows them)\n\n" + "\n".join(lines)


def main() -> NoReturn:
    """Entry point of the console command."""
    name, *argv = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        sys.exit(0)
    if name == "--version":
        print(__version__)
        sys.exit(0)
    if name not in COMMANDS:
        print(f"error: no command `{name}`{nearest(name, COMMANDS)}; see opencoder --help", file=sys.stderr)
        sys.exit(2)
    run(importlib.import_module(COMMANDS[name][0]).main, argv)


if __name__ == "__main__":
    main()
