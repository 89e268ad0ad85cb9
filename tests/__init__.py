"""The tests' environment, set before any of them imports torch."""

import os

# Idle threads that spin make the tests with two threads 40 times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
