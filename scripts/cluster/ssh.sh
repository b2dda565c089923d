#!/usr/bin/env bash
# One run on machines that answer to ssh and share this folder: the same command on each; they meet at the first one.
#
#   scripts/cluster/ssh.sh node1 node2
#
# Stop it with Ctrl-C: the run saves. Start it again with the same words: the run goes on.
set -uo pipefail
[[ $# -ge 1 ]] || { echo "usage: $0 HOST ..." >&2; exit 2; }
first=$1 nodes=$# gpus=8 out=runs/lora_sft/two_machines
if [[ -e $out/identity.json ]]; then key=resume; else key=out; fi

agents=()
hosts=("$@")
# the machine whose process writes the run folder knows which process that is
stop() { for host in "${hosts[@]}"; do ssh "$host" "cd '$PWD' && ftrun cancel $out" 2>/dev/null; done; }
trap stop INT TERM

for host in "${hosts[@]}"; do
    ssh "$host" "cd '$PWD' && exec ftrun train recipe=lora_sft data.path=my.jsonl train.batch_size=64 train.save_steps=100 \
        $key=$out launch.nodes=$nodes launch.processes=$gpus launch.rendezvous=$first:29500" &
    agents+=($!)
done

status=0
for agent in "${agents[@]}"; do
    while :; do wait "$agent"; code=$?; kill -0 "$agent" 2>/dev/null || break; done
    ((code == 0)) || status=$code
done
exit "$status"
