#!/bin/sh
# Trains on a TPU pod slice: the same command on every worker over ssh.
#
#   launch/tpu_pod.sh NAME ZONE python -m mllm_act.train --config=... --workdir=/shared/RUN --config.data.directory=gs://...
#
# The code and its environment must be on the workers, in ~/mllm_act, and --workdir on a file system that all of them
# mount. JAX finds the other workers by the metadata of the machines. Ctrl-C ends the ssh connections, not the training;
# this does:
#
#   launch/tpu_pod.sh NAME ZONE stop
set -eu
name=$1 zone=$2
shift 2

on_all() {
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

if [ "$*" = stop ]; then # SIGTERM: they save the same step and end
  on_all 'test -f ~/mllm_act.pid && kill -TERM "$(cat ~/mllm_act.pid)"'
  exit
fi

command=
for argument in "$@"; do # quoted for the workers' shell
  command="$command '$(printf %s "$argument" | sed "s/'/'\\\\''/g")'"
done
on_all "cd ~/mllm_act && . .venv/bin/activate && echo \$\$ > ~/mllm_act.pid && exec $command"
