"""What `opencoder bench-kernels` measures: cases of operators with their contenders, timing, goals, plots."""
