#!/usr/bin/env bash
# A Slurm cluster of several nodes on this one machine, for tests: everything in $SLURM_RIG, on loopback, as this user.
#
#   SLURM_RIG=DIR slurm_rig.sh start [NODES]     start, wait until the nodes are idle; then `export SLURM_CONF=DIR/etc/slurm.conf`
#   SLURM_RIG=DIR slurm_rig.sh stop              end every daemon that `start` started
#
# With $SLURM_RIG_OWNER, a process id, the cluster stops by itself when that process has ended for any reason.
# Needs the packages slurm-wlm and munge (Debian, Ubuntu). $SLURM_RIG_PORT (16800): first of the ports used.
set -euo pipefail
rig=${SLURM_RIG:?set SLURM_RIG to a folder}
nodes=${2:-2}
port=${SLURM_RIG_PORT:-16800}
host=$(hostname -s)

configure() {
  mkdir -p -m 755 "$rig"/{etc,log,run,state,spool,dev}
  mkdir -p -m 700 "$rig/munge"
  [ -f "$rig/munge/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom > "$rig/munge/munge.key")
  # Stand-ins for GPU devices: requests for them are counted and scheduled, CUDA_VISIBLE_DEVICES is set.
  for gpu in 0 1; do
    [ -e "$rig/dev/nvidia$gpu" ] || mknod "$rig/dev/nvidia$gpu" c 1 3 2>/dev/null || touch "$rig/dev/nvidia$gpu"
  done
  printf 'AutoDetect=off\nName=gpu File=%s/dev/nvidia[0-1]\n' "$rig" > "$rig/etc/gres.conf"
  cat > "$rig/etc/slurm.conf" <<END
ClusterName=rig
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for its old credentials to expire: seconds here instead of the two minutes of the default.
AuthInfo=socket=$rig/run/munge.socket,cred_expire=5
SlurmctldPort=$((port + 17))
SlurmctldPidFile=$rig/run/slurmctld.pid
SlurmdPidFile=$rig/run/slurmd.%n.pid
SlurmctldLogFile=$rig/log/slurmctld.log
SlurmdLogFile=$rig/log/slurmd.%n.log
StateSaveLocation=$rig/state
SlurmdSpoolDir=$rig/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=2,sched_interval=2
SlurmdParameters=config_overrides
CommunicationParameters=NoInAddrAny
EnforcePartLimits=ALL
ReturnToService=2
KillWait=30
MinJobAge=3600
MessageTimeout=60
TCPTimeout=20
SlurmdTimeout=300
InactiveLimit=0
MailProg=/bin/true
GresTypes=gpu
NodeName=n[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 21))-$((port + 20 + nodes))] CPUs=16 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=n[1-$nodes] Default=YES MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
# Jobs of the partition "urgent" take nodes from those of "spare", which have GraceTime seconds to save.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=spare Nodes=n[1-$nodes] MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=n[1-$nodes] MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
END
}

export SLURM_CONF=$rig/etc/slurm.conf
case ${1:?start or stop} in
  start)
    configure
    munged --key-file="$rig/munge/munge.key" --socket="$rig/run/munge.socket" --pid-file="$rig/run/munged.pid" \
      --log-file="$rig/log/munged.log" --seed-file="$rig/munge/seed" --num-threads=2 --force
    slurmctld -f "$SLURM_CONF"
    for number in $(seq "$nodes"); do slurmd -f "$SLURM_CONF" -N "n$number"; done
    if [ -n "${SLURM_RIG_OWNER:-}" ]; then
      setsid bash -c 'while kill -0 "$1" 2>/dev/null && [ -d "$2/run" ]; do sleep 1; done; SLURM_RIG="$2" exec bash "$3" stop' \
        watch "$SLURM_RIG_OWNER" "$rig" "$(readlink -f "$0")" > /dev/null 2>&1 < /dev/null &
    fi
    for _ in $(seq 240); do
      [ "$(sinfo --noheader --states=idle --format=%D 2>/dev/null | tail -1)" = "$nodes" ] && exit 0
      sleep 0.25
    done
    echo "the nodes did not become idle; see $rig/log:" >&2
    tail -n 5 "$rig"/log/* >&2
    exit 1
    ;;
  stop)
    pids=()
    for file in "$rig"/run/slurmd.*.pid "$rig/run/slurmctld.pid" "$rig/run/munged.pid"; do
      [ -f "$file" ] && pids+=("$(cat "$file")")
    done
    [ ${#pids[@]} -gt 0 ] || exit 0
    kill "${pids[@]}" 2>/dev/null || true
    for _ in $(seq 50); do kill -0 "${pids[@]}" 2>/dev/null || exit 0; sleep 0.1; done
    kill -KILL "${pids[@]}" 2>/dev/null || true
    ;;
esac
