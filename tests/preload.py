"""What the fork server of tests/harness.py loads once: importing it must not start threads."""

import torch.distributed.tensor  # noqa: F401

import opencoder.checkpoint.native
import opencoder.model.initialise
import opencoder.optim.optimizer
import opencoder.train.loop  # noqa: F401
