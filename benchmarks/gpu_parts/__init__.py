"""The parts of gpu.py, one file each: PROBES are its probes by name, LIMIT_S is its time limit."""
