#!/usr/bin/env bash
# The paper's recipe on Conceptual Captions. Arguments after the first go to train_cc3m.py and override those below.
#
#   bash examples/cc3m.sh one-gpu  --train-data 'cc3m/{00000..00331}.tar' --run-dir runs/cc3m
#   bash examples/cc3m.sh one-node --train-data 'cc3m/{00000..00331}.tar' --run-dir runs/cc3m
#   NODES=4 NODE=0 HEAD=10.0.0.1:29500 bash examples/cc3m.sh nodes --train-data ...    # on each node, with its own NODE
#
# PER_NODE is the number of processes, and of GPUs, per node (default 8).
set -euo pipefail
script=$(dirname "$0")/train_cc3m.py
launch="python -m torch.distributed.run"
processes=$((${NODES:-1} * ${PER_NODE:-8}))

recipe=(
    --model RN50-quickgelu --head-width 2048 --projection-width 128
    --episode-size 200000 --num-prototypes 20000 --cluster-iterations 20 --cluster-restarts 3
    --target-temperature 0.01 --weight-clip 1 --weight-proto 1 --weight-external 1
    --teacher minilm --teacher-width 64 --teacher-clusters episode --features extracted
    --weight-decay 0.5 --gradient-clip 10 --workers 8 --save-every 1000 --log-every 50
)
small=(--episodes 100 --batch-size 64 --learning-rate 5e-5 --warmup-steps 2000)
large=(--episodes 400 --batch-size $((64 * processes)) --learning-rate 5e-4 --warmup-steps 15625)

case ${1:-} in
one-gpu)
    python "$script" "${recipe[@]}" "${small[@]}" "${@:2}"
    ;;
one-node)
    $launch --standalone --nproc-per-node "$processes" "$script" "${recipe[@]}" "${large[@]}" "${@:2}"
    ;;
nodes)
    $launch --nnodes "$NODES" --node-rank "$NODE" --nproc-per-node "${PER_NODE:-8}" \
        --master-addr "${HEAD%:*}" --master-port "${HEAD##*:}" "$script" "${recipe[@]}" "${large[@]}" "${@:2}"
    ;;
*)
    echo "first argument: one-gpu, one-node or nodes, got '${1:-}'" >&2
    exit 2
    ;;
esac
