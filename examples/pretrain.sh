#!/bin/sh
# Trains a small model from scratch in two processes on this machine's CPU, as train.py does; --fsdp splits the model.
#
# Run: sh examples/pretrain.sh [out-example] [--fsdp]
set -eu
PYTHON=${PYTHON:-python}
here=$(dirname "$0")
out=${1:-$(mktemp -d)}
[ $# -gt 0 ] && shift
mkdir -p "$out"
out=$(cd "$out" && pwd) # train.py reads data/DATASET in its folder: an absolute path works too

# Use the loopback interface, so that no network has to know the machine's name.
[ "$(uname)" = Darwin ] && loopback=lo0 || loopback=lo
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$loopback}" OMP_NUM_THREADS=1

"$PYTHON" "$here/shakespeare_sample.py" "$out/data"
"$PYTHON" -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2 \
    -m hugging_nano_gpt train --dataset="$out/data" --out_dir="$out" --device=cpu --compile=False \
    --n_layer=2 --n_head=2 --n_embd=64 --block_size=64 --batch_size=8 --gradient_accumulation_steps=2 \
    --learning_rate=1e-2 --max_iters=40 --lr_decay_iters=40 --warmup_iters=4 --eval_interval=20 --eval_iters=10 \
    --log_interval=10 "$@" | tee "$out/log"

awk '/^step/ { last = $NF; if (!first) first = last }
    END { print "Validation loss " first " to " last "."; exit !(last < first - 0.5) }' "$out/log"
echo "Wrote $out/ckpt.pt"
