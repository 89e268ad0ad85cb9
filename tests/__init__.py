"""The tests' environment, set before any of them imports torch."""

import os

# Idle threads that spin make the tests with two threads 40 times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# No test asks the Hub, also where it names a folder that is not there.
os.environ["HF_HUB_OFFLINE"] = "1"
