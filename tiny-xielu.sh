#!/usr/bin/env bash
# One node of tiny-xielu: 1 x 2 ranks. Written by python -m megatron_act.launch.
set -euo pipefail

# where this node is
NODE_RANK="${NODE_RANK:-0}"
NODE_ADDR="${NODE_ADDR:-localhost}"
RDZV_HOST="${RDZV_HOST:-localhost}"
RDZV_PORT="${RDZV_PORT:-$((20000 + 2 * ($$ % 6000)))}"
RDZV_ID="${RDZV_ID:-local}"
PREEMPTED=0
RUN_DIR=runs/tiny-xielu
PYTHON=/work/main/.venv/bin/python
export PYTHONPATH=/work/main"${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$RUN_DIR/logs/node-$NODE_RANK"

# Megatron overlaps tensor-parallel communication by the order of launches, which one queue keeps
export CUDA_DEVICE_MAX_CONNECTIONS=1
# torchrun would set it and warn; data loaders are processes, not threads
export OMP_NUM_THREADS=1
# the last lines before a kill reach the log
export PYTHONUNBUFFERED=1
# names the rank and the link that failed; silent otherwise
export NCCL_DEBUG=WARN
# 4 us x 2^22 = 17 s before a retry fails: a link that flaps does not end a run
export NCCL_IB_TIMEOUT=22
# the flight recorder keeps the last collectives of each rank
export TORCH_FR_BUFFER_SIZE=2000
# and writes them when one hangs, which shows the rank that did not come
export TORCH_NCCL_DUMP_ON_TIMEOUT=1

# The notice of a preemption: the ranks save and end. Each is told once, however often it comes.
forward() {
  local rank
  noticed=1
  touch "$mark" || true
  if [[ -n "$child" ]]; then
    for rank in $(pgrep -P "$child"); do
      if [[ "$told" == *" $rank "* ]]; then continue; fi
      told+="$rank "
      kill -TERM "$rank" || true
    done
  fi
  echo "node $NODE_RANK: notice received, the ranks save and end" >&2
}
child=""
told=" "
noticed=0
mark="$RUN_DIR/preempted-$RDZV_ID"
started="$RUN_DIR/logs/node-$NODE_RANK/started"
touch "$started" # a mark that is older is an earlier run's
trap forward USR1 TERM

# the config as it was when the job was submitted
config="$(mktemp)"
trap 'rm -f "$config"' EXIT
cat >"$config" <<'MODEL_ARGS_YAML'
MODEL_ARGS:
  --num-layers: 4
  --hidden-size: 128
  --num-attention-heads: 4
  --ffn-hidden-size: 768
  --activation: xielu
  --qk-layernorm: true
  --normalization: RMSNorm
  --disable-bias-linear: true
  --position-embedding-type: rope
  --norm-epsilon: 1.0e-06
  --rotary-base: 10000
  --untie-embeddings-and-output-weights: true
  --vocab-size: 4096
  --seq-length: 256
  --max-position-embeddings: 256
  --init-method-std: 0.02
  --hidden-dropout: 0.0
  --attention-dropout: 0.0
  --micro-batch-size: 8
  --global-batch-size: 8
  --train-iters: 300
  --lr: 0.002
  --min-lr: 0.0
  --lr-decay-style: WSD
  --lr-wsd-decay-style: minus_sqrt
  --lr-warmup-iters: 30
  --lr-decay-iters: 300
  --lr-wsd-decay-iters: 60
  --adam-beta1: 0.9
  --adam-beta2: 0.95
  --weight-decay: 0.1
  --clip-grad: 1.0
  --seed: 42
MODEL_ARGS_YAML

# One module under torchrun. Some Slurm set-ups send SIGUSR1 to all processes: it must not end the ranks.
ranks() {
  local module="$1" port="$2" restarts="$3"
  shift 3
  (
    trap '' USR1
    exec "$PYTHON" -m megatron_act.interruption_torchrun \
      --nnodes 1 \
      --nproc-per-node 2 \
      --max-restarts "$restarts" \
      --rdzv-backend c10d \
      --rdzv-id "$RDZV_ID-$module" \
      --rdzv-endpoint "$RDZV_HOST:$port" \
      --rdzv-conf "is_host=$((NODE_RANK == 0)),join_timeout=900,read_timeout=900" \
      --local-addr "$NODE_ADDR" \
      --log-dir "$RUN_DIR/logs/node-$NODE_RANK" \
      --redirects 3 \
      --tee 3 \
      -m "$module" \
      --config "$config" \
      --exit-signal-handler \
      --save runs/tiny-xielu/checkpoints \
      --load runs/tiny-xielu/checkpoints \
      --save-interval 1000 \
      --tensorboard-dir runs/tiny-xielu/tensorboard \
      --metrics-jsonl runs/tiny-xielu/metrics.jsonl \
      --cpu \
      --tensor-model-parallel-size 2 \
      --log-interval 10 \
      --mock-data \
      --tokenizer-type NullTokenizer \
      --vocab-size 4095 \
      --train-iters 4 \
      "$@"
  ) &
  child=$!
  local code
  while true; do # a trapped signal ends the waiting, not what is waited for
    code=0
    noticed=0
    wait "$child" || code=$?
    if [[ "$noticed" == 0 ]]; then break; fi
  done
  child=""
  return "$code"
}

ranks megatron_act.preflight "$((RDZV_PORT + 1))" 0 || {
  echo "preflight: node $NODE_RANK stops; rank 0 names each failed check" >&2
  exit 2
}
ranks megatron_act.pretrain_gpt "$RDZV_PORT" 3
if [[ "$mark" -nt "$started" ]]; then exit "$PREEMPTED"; fi
