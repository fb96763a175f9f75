#!/usr/bin/env bash
# Runs on this machine, on all devices that JAX sees. Start it again with the same workdir to go on where it stopped.
#
#   launch/local.sh configs/coin_mini.py runs/mini
#   CUDA_VISIBLE_DEVICES=0,1 launch/local.sh configs/coin.py runs/coin \
#     --config.model.path=/models/llava-1.5-7b-hf --config.data.root=/data/CoIN
#   launch/local.sh --dry-run configs/coin.py runs/coin      prints the command
#
# Arguments: a config, a workdir, then any flags of proglora_jax.main.
# Ctrl-C and SIGTERM save a checkpoint and end the run with exit code 0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

dry=0
if [[ ${1:-} == --dry-run ]]; then dry=1; shift; fi
if (( $# < 2 )); then
  echo "usage: launch/local.sh [--dry-run] CONFIG WORKDIR [FLAGS OF proglora_jax.main ...]" >&2
  exit 2
fi
config=$1 workdir=$2
shift 2

command=(python -m proglora_jax.main --config "$config" --workdir "$workdir" "$@")
if (( dry )); then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
exec "${command[@]}"
