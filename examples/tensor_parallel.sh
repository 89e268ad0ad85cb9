#!/bin/sh
# Splits the demo model over two processes on this machine's CPU.
#
# Run: sh examples/tensor_parallel.sh
set -eu
PYTHON=${PYTHON:-python}

# All on the loopback interface, so that the machine's name need not be known to any network.
[ "$(uname)" = Darwin ] && loopback=lo0 || loopback=lo
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$loopback}" OMP_NUM_THREADS=1

"$PYTHON" -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2 \
    "$(dirname "$0")/tensor_parallel.py"
