"""What the process has imported that tests/helpers/processes.py forks others from; nothing else imports this."""

import gc

from . import distributed_worker, tensor_parallel_worker  # noqa: F401

gc.freeze()  # or each process forked looks through all of it, and so copies it
