#!/usr/bin/env bash
# A Slurm cluster on this machine, for tests: tests/slurm/cluster.sh up|down|status FOLDER [NODES]
#
#   tests/slurm/cluster.sh up /tmp/cluster        # three nodes; then: export SLURM_CONF=/tmp/cluster/slurm.conf
#   sinfo; sbatch ...; squeue
#   tests/slurm/cluster.sh down /tmp/cluster      # ends all that runs in it; the logs stay
#
# Needs root and Debian's packages slurm-wlm and munge. Everything lives in FOLDER: keys, sockets, logs, state.
# `up` on a cluster that runs starts what is missing, for example a slurmd that was killed.
set -euo pipefail

usage() {
    echo "usage: tests/slurm/cluster.sh up|down|status FOLDER [NODES]" >&2
    exit 2
}
[[ $# -ge 2 && $# -le 3 && ${3:-3} =~ ^[1-9]$ ]] || usage
action=$1
folder=$(realpath -m "$2")
nodes=${3:-3}
# A unix socket's path has 107 characters at most.
((${#folder} <= 80)) || { echo "error: $folder is too long for a socket's path; take a shorter one" >&2; exit 2; }
export PATH=$PATH:/usr/sbin:/sbin SLURM_CONF=$folder/slurm.conf

# Names are addresses of the loopback network, so that tasks find each other without a name server.
node_name() { echo "127.0.0.$1"; }

# The process that a pid file names, if it is still that program.
running() {
    local pid
    pid=$(cat "$folder/$1.pid" 2>/dev/null) && [[ $(cat "/proc/$pid/comm" 2>/dev/null) == "$2" ]]
}

# Three ports in a row for slurmctld, and one for each slurmd, that nobody listens at.
free_port() {
    local port
    for port in $(shuf -i 20000-30000 -n 50); do
        ss -Hltn "sport >= :$port and sport <= :$((port + 20))" | grep -q . || { echo "$port"; return; }
    done
    echo "error: no free ports between 20000 and 30000" >&2
    exit 1
}

write_config() {
    local port n
    port=$(free_port)
    {
        cat <<CONFIG
ClusterName=tests
SlurmUser=root
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
AuthType=auth/munge
# A job that is requeued waits until its old credentials have expired: 120 s by default.
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# GPUs that are only counted, so that scripts for GPU nodes run as they are.
GresTypes=gpu
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
# A node whose slurmd is silent is down, and its jobs are requeued: 300 s by default.
SlurmdTimeout=5
SlurmctldTimeout=10
# Between SIGTERM and SIGKILL: 30 s by default.
KillWait=10
MinJobAge=3600
# Training takes its port from the job's number: two clusters on a machine must not have the same.
FirstJobId=$((1 + port % 4000))
SchedulerParameters=sched_interval=2,sched_min_interval=500000,batch_sched_delay=0,bf_interval=2
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdSpoolDir=$folder/spool/%n
SlurmdPidFile=$folder/%n.pid
SlurmdLogFile=$folder/%n.log
CONFIG
        for ((n = 1; n <= nodes; n++)); do
            echo "NodeName=$(node_name "$n") NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((port + n))" \
                "CPUs=4 RealMemory=4000 Gres=gpu:8 State=UNKNOWN"
        done
        # Jobs of the second partition take the nodes of those in the first, after they were told.
        echo "PartitionName=gpu Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 GraceTime=40 State=UP"
        echo "PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=10 PreemptMode=OFF State=UP"
    } >"$SLURM_CONF"
    touch "$folder"/gpu{0..7}
    echo "Name=gpu File=$folder/gpu[0-7]" >"$folder/gres.conf"
}

up() {
    local n tool
    for tool in munged slurmctld slurmd sbatch ss; do
        command -v "$tool" >/dev/null || {
            echo "error: $tool is missing; expected Debian's slurm-wlm, munge and iproute2: apt install them" >&2
            exit 2
        }
    done
    [[ $(id -u) == 0 ]] || { echo "error: slurmd needs root, this is $(id -un)" >&2; exit 2; }
    mkdir -p "$folder/state"
    chmod 755 "$folder"
    if [[ ! -e $folder/munge.key ]]; then
        (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
    fi
    if [[ ! -e $SLURM_CONF ]]; then write_config; fi
    running munged munged || munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
        --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" \
        2>>"$folder/munged.log"
    running slurmctld slurmctld || slurmctld
    while read -r n; do
        mkdir -p "$folder/spool/$n"
        running "$n" slurmd || slurmd -N "$n"
    done < <(sed -n 's/^NodeName=\([^ ]*\).*/\1/p' "$SLURM_CONF")
    for ((n = 0; n < 60; n++)); do
        # Every node idle or at work, none down or unknown.
        if sinfo --noheader --Node --format=%T 2>/dev/null | grep -qvE '^(idle|mixed|allocated|completing)$'; then
            sleep 0.5
        elif sinfo --noheader --Node --format=%T 2>/dev/null | grep -q .; then
            return
        else
            sleep 0.5
        fi
    done
    echo "error: the cluster did not come up within 30 s; see the logs in $folder" >&2
    status >&2
    exit 1
}

# All that was started with this cluster's configuration, but for those that started this script.
members() {
    local ancestors=" $$ $BASHPID " pid=$$ entry
    while ((pid > 1)); do
        pid=$(awk '/^PPid:/ {print $2}' "/proc/$pid/status")
        ancestors+="$pid "
    done
    for entry in /proc/[0-9]*; do
        pid=${entry#/proc/}
        [[ $ancestors == *" $pid "* ]] && continue
        if tr '\0' '\n' <"$entry/environ" 2>/dev/null | grep -qxF "SLURM_CONF=$SLURM_CONF"; then echo "$pid"; fi
    done 2>/dev/null
}

down() {
    local signal found
    for signal in TERM TERM KILL; do
        # The subshells that look are gone by the time that they are signalled.
        mapfile -t found < <(members)
        ((${#found[@]} == 0)) && break
        kill "-$signal" "${found[@]}" 2>/dev/null || true
        sleep 1
    done
    rm -rf "$folder"/{state,spool,munge.key,munge.seed,slurm.conf,gres.conf} "$folder"/gpu? "$folder"/*.pid "$folder"/munge.socket*
}

status() {
    sinfo --Node --long 2>&1 || true
    squeue 2>&1 || true
}

case $action in
    up | down | status) "$action" ;;
    *) usage ;;
esac
