"""Parts of `opencoder bench-classification`: synthetic classes, steps on several ranks, learning, the simulated rank."""
