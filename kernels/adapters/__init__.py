"""Kernels of other packages behind our functions, used where the real package is installed: flash_attn, apex, liger.

None is required, built or imported unless it is there. A package counts as there when the very symbols that are called
import and take the arguments that are passed: `apex` on the package index, for one, is something else."""
