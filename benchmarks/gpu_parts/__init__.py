"""The parts of gpu.py, a file each: PROBES names what it tries, LIMIT_S is the time it may take."""
