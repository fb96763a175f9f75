#!/usr/bin/env bash
# Kubernetes: fills in launch/k8s/job.yaml and applies it; the same command again goes on where the run stopped.
#
#   docker build -f launch/k8s/Dockerfile -t REGISTRY/proglora-jax . && docker push REGISTRY/proglora-jax
#   IMAGE=REGISTRY/proglora-jax PODS=2 GPUS=8 launch/k8s/run.sh configs/coin.py:batches=coin_scripts /runs/coin \
#     --config.train.micro_batches=4 --config.model.path=/data/llava-1.5-7b-hf --config.data.root=/data/CoIN
#   launch/k8s/run.sh --dry-run configs/coin.py /runs/coin      prints the manifests
#
# IMAGE has this package; PODS have GPUS each. The workdir is below /runs, the data below /data: the volume claims of job.yaml.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

dry=0
if [[ ${1:-} == --dry-run ]]; then dry=1; shift; fi
if (( $# < 2 )); then
  echo "usage: IMAGE=... PODS=... GPUS=... launch/k8s/run.sh [--dry-run] CONFIG WORKDIR [FLAGS OF proglora_jax.main ...]" >&2
  exit 2
fi
config=$1 workdir=$2
shift 2

# a JSON list is YAML too: every argument in quotes, with what the quotes would end escaped
list=
for argument in --config "$config" --workdir "$workdir" "$@"; do
  argument=${argument//\\/\\\\}
  list+=", \"${argument//\"/\\\"}\""
done
manifests=$(<launch/k8s/job.yaml)
manifests=${manifests//LOSSES/$(( 16 * ${PODS:-1} ))}
manifests=${manifests//PODS/${PODS:-1}}
manifests=${manifests//GPUS/${GPUS:-8}}
manifests=${manifests//'"IMAGE"'/"\"${IMAGE:-proglora-jax:latest}\""}
manifests=${manifests/'args: []'/"args: [${list:2}]"}

if (( dry )); then
  printf '%s\n' "$manifests"
  exit
fi
# a Job that has ended, or runs with other arguments, makes room; its checkpoints stay
kubectl delete job proglora --ignore-not-found --wait
kubectl apply -f - <<<"$manifests"
