"""Evaluation: tasks of benchmarks, a sandbox for the programs that models write, unbiased scores."""
