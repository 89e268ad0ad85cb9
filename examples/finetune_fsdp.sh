#!/bin/sh
# Continues the demo run with FSDP2 in two processes on this machine's CPU, and writes one complete ckpt.pt.
#
# Run: sh examples/finetune_fsdp.sh [out-example]
set -eu
PYTHON=${PYTHON:-python}
here=$(dirname "$0")
out=${1:-$(mktemp -d)}

# Use the loopback interface, so that no network has to know the machine's name.
[ "$(uname)" = Darwin ] && loopback=lo0 || loopback=lo
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$loopback}" OMP_NUM_THREADS=1

"$PYTHON" "$here/shakespeare_sample.py" "$out/data"
"$PYTHON" -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2 \
    "$here/finetune_fsdp.py" "$out/data" "$out/ckpt.pt"
echo "Wrote $out/ckpt.pt"
