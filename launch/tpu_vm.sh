#!/usr/bin/env bash
# Cloud TPU: makes a TPU VM slice, installs this checkout on every host, and runs there until the run has finished.
#
#   NAME=proglora ZONE=us-east5-b TYPE=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite NFS=10.0.0.2:/share \
#     launch/tpu_vm.sh configs/coin.py:batches=mcitlib64 runs/coin --config.mesh.fsdp=16 --config.train.micro_batches=4 \
#     --config.model.path=/mnt/proglora/llava-1.5-7b-hf --config.data.root=/mnt/proglora/CoIN
#   ... launch/tpu_vm.sh --dry-run configs/coin.py runs/coin      prints the commands
#
# The workdir is relative to the NFS share (Filestore), which is mounted on every host, and belongs to the user as whom gcloud signs in.
# Where that user cannot write it, as on a fresh share, whose root is root's, sudo makes it and hands it over (not with root_squash).
# A slice of one host can do without NFS and keeps the workdir on its own disk, which goes with the slice. A bucket mounted with gcsfuse
# will not do: checkpoints need renames that happen at once.
# CAPACITY is spot (the default), on-demand or reserved. Spot slices are taken away at any time: the run gets SIGTERM and saves; this script
# makes the slice again and goes on. While there is no room, or a host does not answer, it tries again every PAUSE seconds, TRIES times in
# all; a lost connection or process it survives 16 times. It leaves the slice in place when the run ends; remove it with
#   gcloud compute tpus tpu-vm delete "$NAME" --zone "$ZONE"
# On a slice JAX finds the other hosts by itself: "--distributed" needs no addresses.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

dry=0
if [[ ${1:-} == --dry-run ]]; then dry=1; shift; fi
if (( $# < 2 )); then
  echo "usage: NAME=... ZONE=... TYPE=... RUNTIME=... [NFS=... CAPACITY=...] launch/tpu_vm.sh [--dry-run] CONFIG WORKDIR [FLAGS ...]" >&2
  exit 2
fi
: "${NAME:?a name for the slice}" "${ZONE:?its zone}" "${TYPE:?its type, e.g. v5litepod-16}" "${RUNTIME:?its software version}"
case ${CAPACITY:-spot} in
  spot | reserved) capacity=--${CAPACITY:-spot} ;;
  on-demand) capacity= ;;
  *) echo "error: CAPACITY=$CAPACITY: must be spot, on-demand or reserved" >&2; exit 2 ;;
esac
config=$(printf '%q' "$1") workdir=$(printf '%q' "$2") nfs=$(printf '%q' "${NFS:-}")
shift 2
flags=
if (( $# )); then flags=$(printf ' %q' "$@"); fi
shared='~'
if [[ -n ${NFS:-} ]]; then shared=/mnt/proglora; fi

tpu_vm() {  # VERB ARGUMENTS ...
  if (( dry )); then { printf '%q ' gcloud compute tpus tpu-vm "$@" --zone "$ZONE"; echo; } >&3; return; fi
  gcloud compute tpus tpu-vm "$@" --zone "$ZONE"
}
exec 3>&1
on_all_hosts() { tpu_vm ssh "$NAME" --worker=all --command "$1"; }
state() { if (( ! dry )); then tpu_vm describe "$NAME" --format 'value(state)' 2>/dev/null || true; fi; }

# For a host's shell: asks the run that is there to end, once, and waits until it has saved; false where there is none. gcloud starts a
# command again whose connection was lost, while the first may still run; a second signal would end a run before it has saved.
# shellcheck disable=SC2016  # the variables are those of the host's shell
end_run='end_run() {
      read -r old asked 2>/dev/null < ~/proglora.pid || return 1
      if [ "$old" = $$ ] || ! grep -qs proglora_jax "/proc/$old/cmdline"; then return 1; fi
      if [ -z "$asked" ]; then echo "$old asked" > ~/proglora.pid; kill "$old" || true; fi
      while [ -e "/proc/$old" ]; do sleep 1; done
    }'

prepare() {  # the slice with this checkout, without its history and environments; what a lost connection left running ends before
  local now; now=$(state)
  if [[ $now == PREEMPTED || $now == TERMINATED ]]; then tpu_vm delete "$NAME" --quiet && now= || return; fi
  if [[ -z $now ]]; then tpu_vm create "$NAME" --accelerator-type "$TYPE" --version "$RUNTIME" ${capacity:+"$capacity"} || return; fi
  git ls-files -z | tar --create --gzip --null --files-from=- --file "$archive" || return
  tpu_vm scp "$archive" "$NAME":proglora.tar.gz --worker=all || return
  on_all_hosts "set -e
    $end_run
    get() { sudo apt-get -qq -o DPkg::Lock::Timeout=600 update && sudo apt-get -qq -y -o DPkg::Lock::Timeout=600 install \"\$@\"; }
    end_run || true
    mkdir -p proglora && tar --extract --gzip --file proglora.tar.gz --directory proglora
    command -v python3.11 || get python3.11 python3.11-venv
    python3.11 -m venv ~/environment && ~/environment/bin/pip install --quiet -e './proglora[tpu]'
    if [ -z $nfs ]; then exit; fi
    command -v mount.nfs || get nfs-common
    sudo mkdir -p $shared && { mountpoint -q $shared || sudo mount $nfs $shared; }
    if mkdir -p $shared/$workdir 2>/dev/null && [ -w $shared/$workdir ]; then exit; fi
    sudo mkdir -p $shared/$workdir && sudo chown \$(id -u):\$(id -g) $shared/$workdir"
}

archive=$(mktemp) pause=${PAUSE:-60} tries=${TRIES:-1440} losses=16
trap 'rm -f "$archive"' EXIT
while :; do
  if ! prepare; then
    if (( --tries <= 0 )); then exit 1; else sleep "$pause"; continue; fi
  fi
  status=0
  # a host that shuts down sends SIGHUP to the sessions right after SIGTERM
  on_all_hosts "$end_run
    if end_run; then exit 76; fi
    trap '' HUP
    cd proglora && echo \$\$ > ~/proglora.pid && exec ~/environment/bin/python -m proglora_jax.main \\
    --config $config --workdir $shared/$workdir --distributed --stopped_exit_code 75$flags" || status=$?
  case $status in
    0) exit ;;
    75) ;;  # stopped, to be continued
    76 | 134 | 137 | 139 | 255)  # a process or the connection is lost; of a slice that is being taken away the state says so minutes later
      for (( poll = 0; poll < 10; poll++ )); do if [[ $(state) == READY ]]; then sleep "$pause"; else break; fi; done
      if (( poll == 10 && --losses < 0 )); then exit "$status"; fi ;;
    *) if [[ $(state) == READY ]]; then exit "$status"; fi ;;  # a failure that would come again
  esac
  sleep "$pause"
done
