"""The imports of the process that tests/helpers/processes.py forks others from; no other file imports this one."""

import gc

from . import distributed_worker, tensor_parallel_worker  # noqa: F401

gc.freeze()  # otherwise garbage collection in each forked process touches, and so copies, all of it
