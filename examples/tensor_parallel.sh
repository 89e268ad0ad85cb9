#!/bin/sh
# Splits the demo model between two processes on this machine's CPU.
#
# Run: sh examples/tensor_parallel.sh
set -eu
PYTHON=${PYTHON:-python}

# Use the loopback interface, so that no network has to know the machine's name.
[ "$(uname)" = Darwin ] && loopback=lo0 || loopback=lo
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$loopback}" OMP_NUM_THREADS=1

"$PYTHON" -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2 \
    "$(dirname "$0")/tensor_parallel.py"
