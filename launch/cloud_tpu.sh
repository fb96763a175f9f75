#!/usr/bin/env bash
# Cloud TPU: makes a TPU VM slice, installs this checkout on every host, and runs there until the run has finished.
#
#   NAME=proglora ZONE=us-east5-b TYPE=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite NFS=10.0.0.2:/share \
#     launch/cloud_tpu.sh configs/coin.py runs/coin --config.method.name=proglora_dynamic
#
# The workdir is relative to the NFS share (Filestore), which is mounted on every host. A slice of one host can do without NFS and
# keeps the workdir on its own disk. A bucket mounted with gcsfuse will not do: checkpoints need renames that happen at once.
# Spot slices are taken away at any time: the run gets SIGTERM, saves and exits. Call this script again with the same arguments to go
# on. It leaves the slice in place; remove it with
#   gcloud compute tpus tpu-vm delete "$NAME" --zone "$ZONE"
# On a slice JAX finds the other hosts by itself: "--distributed" needs no addresses.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if (( $# < 2 )); then
  echo "usage: NAME=... ZONE=... TYPE=... RUNTIME=... [NFS=...] launch/cloud_tpu.sh CONFIG WORKDIR [FLAGS OF proglora_jax.main ...]" >&2
  exit 2
fi
: "${NAME:?a name for the slice}" "${ZONE:?its zone}" "${TYPE:?its type, e.g. v5litepod-16}" "${RUNTIME:?its software version}"
config=$(printf '%q' "$1") workdir=$(printf '%q' "$2")
shift 2
flags=
if (( $# )); then flags=$(printf ' %q' "$@"); fi

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command "$1"
}

if ! gcloud compute tpus tpu-vm describe "$NAME" --zone "$ZONE" >/dev/null 2>&1; then
  gcloud compute tpus tpu-vm create "$NAME" --zone "$ZONE" --accelerator-type "$TYPE" --version "$RUNTIME" --spot
fi

# the checkout without its history and environments
archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
git ls-files -z | tar --create --gzip --null --files-from=- --file "$archive"
gcloud compute tpus tpu-vm scp "$archive" "$NAME":proglora.tar.gz --zone "$ZONE" --worker=all
on_all_hosts "set -e
  mkdir -p proglora && tar --extract --gzip --file proglora.tar.gz --directory proglora
  command -v python3.11 || { sudo apt-get update -qq && sudo apt-get install -y -qq python3.11 python3.11-venv; }
  python3.11 -m venv ~/environment && ~/environment/bin/pip install --quiet -e './proglora[tpu]'"

shared='~'
if [[ -n ${NFS:-} ]]; then
  shared=/mnt/proglora
  on_all_hosts "command -v mount.nfs || { sudo apt-get update -qq && sudo apt-get install -y -qq nfs-common; }
    sudo mkdir -p $shared && { mountpoint --quiet $shared || sudo mount $(printf '%q' "$NFS") $shared; }"
fi

on_all_hosts "cd proglora && exec ~/environment/bin/python -m proglora_jax.main \\
  --config $config --workdir $shared/$workdir --distributed$flags"
