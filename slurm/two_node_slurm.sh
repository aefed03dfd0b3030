#!/usr/bin/env bash
# A real SLURM with two nodes on this one machine, for tests. Debian: apt-get install slurm-wlm munge; run as root.
#   slurm/two_node_slurm.sh start DIR     then   export SLURM_CONF=DIR/slurm.conf;  srun -N2 hostname
#   slurm/two_node_slurm.sh stop DIR
# Each node has one core to give. All it needs lies in DIR, its own munge key and socket too; nothing else is changed.
set -euo pipefail

stop() {
  local name pid
  export SLURM_CONF=$dir/slurm.conf
  for _ in {1..50}; do  # a daemon that is gone leaves its jobs' processes behind
    [[ $(squeue --noheader 2>/dev/null) ]] || break
    scancel --quiet --signal=KILL --full --user="$(id -un)" 2>/dev/null || true
    scancel --quiet --user="$(id -un)" 2>/dev/null || true
    sleep 0.2
  done
  for name in slurmctld slurmd.n1 slurmd.n2 munged; do
    [[ -s $dir/$name.pid ]] || continue
    pid=$(<"$dir/$name.pid")
    kill "$pid" 2>/dev/null || continue
    for _ in {1..50}; do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
    kill -9 "$pid" 2>/dev/null || true
  done
}

free_ports() {  # as many ports as asked for that nobody listens on
  python3 -c '
import socket, sys
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*(s.getsockname()[1] for s in held))' "$1"
}

start() {
  local host controller first second
  host=$(hostname -s)
  read -r controller first second < <(free_ports 3)
  mkdir -p "$dir/state" "$dir/spool.n1" "$dir/spool.n2"
  chmod 755 "$dir"  # munged refuses a socket that not everybody can reach
  cat >"$dir/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its credential has expired: two minutes, unless this is said. Five seconds is the least.
AuthInfo=socket=$dir/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.%n.log
SlurmctldDebug=verbose
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
# A job that has ended is answered for an hour, not five minutes: there is no accounting to ask.
MinJobAge=3600
JobRequeue=1
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=n1 NodeAddr=127.0.0.1 NodeHostname=$host Port=$first CPUs=1 RealMemory=8000
NodeName=n2 NodeAddr=127.0.0.1 NodeHostname=$host Port=$second CPUs=1 RealMemory=8000
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF
  head -c 1024 /dev/urandom >"$dir/munge.key"
  chmod 400 "$dir/munge.key"
  munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
    --log-file="$dir/munged.log" --seed-file="$dir/munged.seed"
  export SLURM_CONF=$dir/slurm.conf
  slurmctld -c -f "$SLURM_CONF"
  slurmd -f "$SLURM_CONF" -N n1
  slurmd -f "$SLURM_CONF" -N n2
  for _ in {1..100}; do
    [[ $(sinfo --noheader --Node --format=%T 2>/dev/null | sort | uniq -c | tr -s ' ') == ' 2 idle' ]] && return
    sleep 0.2
  done
  echo "the two nodes did not come up; see $dir/*.log" >&2
  stop
  exit 1
}

[[ $# == 2 && $1 =~ ^(start|stop)$ ]] || { sed -n '2,5s/^# //p' "$0" >&2; exit 2; }
dir=$(realpath -m "$2")
"$1"
