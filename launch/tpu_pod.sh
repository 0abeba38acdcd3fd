#!/usr/bin/env bash
# Trains on a Cloud TPU slice of several hosts, one process per host.
#
#   bash launch/tpu_pod.sh create                          asks for the slice and waits until it is there
#   bash launch/tpu_pod.sh install                         brings this repository, as committed, to all hosts
#   bash launch/tpu_pod.sh train CONFIG [key=value ...]    trains; paths are those of the hosts
#   bash launch/tpu_pod.sh delete                          gives the slice back
#
# The processes find each other through the metadata of the slice. `output` has to be on a file system that all hosts
# share: with SHARE, a Filestore (NFS) volume, `install` mounts one at /mnt/share. After a preemption, `create`,
# `install` and the same `train` go on from the last checkpoint.
set -euo pipefail

NAME="${NAME:-qtale}"
PROJECT="${PROJECT:-$(gcloud config get-value project)}"
ZONE="${ZONE:-us-east5-b}"
ACCELERATOR="${ACCELERATOR:-v6e-32}"
RUNTIME="${RUNTIME:-v2-alpha-tpuv6e}"
SHARE="${SHARE:-}"  # such as 10.0.0.2:/share

place=(--project="$PROJECT" --zone="$ZONE")

on_all_hosts() {
    gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker=all --command="$1"
}

create() {
    gcloud compute tpus queued-resources create "$NAME" "${place[@]}" --node-id="$NAME" \
        --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME"
    local state=
    until [[ "$state" == ACTIVE ]]; do
        sleep 30
        state="$(gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" --format='value(state.state)')"
        printf '%s is %s\n' "$NAME" "$state" >&2
        if [[ "$state" == FAILED || "$state" == SUSPENDED ]]; then exit 1; fi
    done
}

install() {
    local archive
    archive="$(mktemp --suffix=.tar.gz)"
    git archive --format=tar.gz --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$NAME:qtale.tar.gz" "${place[@]}" --worker=all
    rm "$archive"
    if [[ -n "$SHARE" ]]; then
        on_all_hosts "sudo apt-get install -y -q nfs-common && sudo mkdir -p /mnt/share && sudo mount $SHARE /mnt/share"
    fi
    on_all_hosts 'set -eo pipefail; mkdir -p qtale && tar -xzf qtale.tar.gz -C qtale && cd qtale
        curl -LsSf https://astral.sh/uv/install.sh | sh
        ~/.local/bin/uv venv --clear --python 3.12
        ~/.local/bin/uv pip install --constraint constraints.txt --editable ".[tpu]"'
}

train() {
    local arguments
    printf -v arguments '%q ' "${1:?usage: bash launch/tpu_pod.sh train CONFIG [key=value ...]}" \
        distributed.enabled=true "${@:2}"
    on_all_hosts "cd qtale && exec .venv/bin/python -m qtale_jax.train $arguments"
}

delete() {
    gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet
}

case "${1:-}" in
    create | install | train | delete) "$@" ;;
    *)
        sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
        exit 2
        ;;
esac
