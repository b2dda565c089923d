#!/usr/bin/env bash
# A real Slurm of two nodes on this machine, for tests: one controller, two node daemons, one CPU each.
#
#   scripts/slurm_testbed.sh start DIR    start it; all it writes lies below DIR
#   scripts/slurm_testbed.sh env DIR      print what to eval before sbatch, squeue, scontrol
#   scripts/slurm_testbed.sh node DIR N   start the daemon of node n1 or n2 again
#   scripts/slurm_testbed.sh stop DIR     end it
#
# Needs root, and Debian's packages: apt-get install slurm-wlm munge
set -euo pipefail

fail() { echo "slurm_testbed: $*" >&2; exit 1; }
usage() { fail "usage: $0 start|stop|env DIR, or node DIR n1|n2"; }

config() {
    local port
    port=$(free_ports 3)
    read -r controller first second <<<"$port"
    cat >"$dir/slurm.conf" <<CONF
ClusterName=testbed
SlurmctldHost=localhost
SlurmctldPort=$controller
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,sched_min_interval=100000,batch_sched_delay=1
ReturnToService=2
JobRequeue=1
SlurmdTimeout=6
InactiveLimit=0
KillWait=15
MinJobAge=600
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$first CPUs=1 RealMemory=2000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$second CPUs=1 RealMemory=2000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF
    # IgnoreSystemd: without it every task launch hangs where systemd does not run
    printf 'CgroupAutomount=no\nIgnoreSystemd=yes\n' >"$dir/cgroup.conf"
}

free_ports() {
    python3 - "$1" <<'PY'
import socket, sys
sockets = [socket.socket() for _ in range(int(sys.argv[1]))]
for one in sockets:
    one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in sockets))
PY
}

start_munge() {
    mkdir -p "$dir/munge"
    dd if=/dev/urandom of="$dir/munge/key" bs=128 count=1 status=none
    chmod 400 "$dir/munge/key"
    # --force: folders above DIR may belong to anyone; as root, for only root reaches them all
    munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munge/pid" \
        --seed-file="$dir/munge/seed" --log-file="$dir/munge/log"
}

start_node() {
    rm -f "$dir/slurmd.$1.pid"
    slurmd -f "$dir/slurm.conf" -N "$1"
}

start() {
    [[ $EUID == 0 ]] || fail "needs root"
    for program in munged slurmctld slurmd sbatch; do
        command -v "$program" >/dev/null || fail "$program is not installed: apt-get install slurm-wlm munge"
    done
    [[ ! -e $dir/slurm.conf ]] || fail "$dir holds a testbed already"
    mkdir -p "$dir/state" "$dir/spool.n1" "$dir/spool.n2"
    config
    start_munge
    slurmctld -f "$dir/slurm.conf"
    start_node n1
    start_node n2
    # nodes take some seconds to register
    for _ in $(seq 60); do
        if [[ $(sinfo -h -N -t idle -o %N 2>/dev/null | wc -l) == 2 ]]; then return; fi
        sleep 0.5
    done
    stop
    fail "the nodes did not come up; see $dir/*.log"
}

stop() {
    scancel --state=RUNNING --state=PENDING --user=root 2>/dev/null || true
    for file in "$dir"/slurmd.n1.pid "$dir"/slurmd.n2.pid "$dir"/slurmctld.pid "$dir"/munge/pid; do
        [[ -s $file ]] && kill "$(cat "$file")" 2>/dev/null || true
    done
    for _ in $(seq 40); do
        pgrep -f "^slurm(ctld|d) -f $dir/slurm.conf" >/dev/null || return 0
        sleep 0.25
    done
    echo "slurm_testbed: some daemons are still there; see $dir" >&2
}

[[ $# -ge 2 ]] || usage
mkdir -p "$2"
dir=$(cd "$2" && pwd -P)
export PATH=$PATH:/usr/sbin:/sbin SLURM_CONF=$dir/slurm.conf
case $1 in
start) start ;;
stop) stop ;;
env) echo "export SLURM_CONF='$dir/slurm.conf'" ;;
node) start_node "${3:?which node: n1 or n2}" ;;
*) usage ;;
esac
