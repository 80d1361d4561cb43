"""Parallelism: mesh and groups, placements, layers split over tensor-parallel ranks, gradient reduction.

Nothing in here knows a model. A layer is handed its group and never asks torch.distributed who it is; at size 1 there
is no process group at all, so every layer runs in a plain unit test."""
