#!/usr/bin/env bash
# A real SLURM on one machine, for the tests of this folder. Run as root.
#
#   cluster.sh install          Debian's packages, and shellcheck, if they are missing
#   cluster.sh missing          prints what is missing, line by line
#   cluster.sh up               munge, slurmctld and NODES nodes; prints the folder's env.sh, to be sourced
#   cluster.sh crash node2      SIGKILL everything on a node: its daemon and the ranks, as if the power failed
#   cluster.sh boot node2       start a node (again)
#   cluster.sh down             stop what `up` started, and nothing else
#
# Every node is a network, process and host-name namespace of its own with the address 10.78.0.N, on a bridge without a
# way out. The daemons' files are in BASE.
set -euo pipefail

BASE=${BASE:-/tmp/megalite-slurm} NODES=${NODES:-3} CPUS=${CPUS:-4}
NET=10.78.0 BRIDGE=br-megalite MARK='# megalite-slurm'
PATH=$PATH:/usr/sbin:/sbin
export SLURM_CONF=$BASE/etc/slurm.conf

missing() { # what a cluster needs and is not here
    for program in slurmctld slurmd srun munged ip; do command -v $program >/dev/null || echo "$program"; done
    [[ $(id -u) == 0 ]] || echo "root: nodes are namespaces"
}

install() {
    [[ $(missing) ]] || ! command -v shellcheck >/dev/null || return 0
    # Packages start their daemons when they are installed, unless this file forbids it.
    local policy=/usr/sbin/policy-rc.d ours=
    [[ -e $policy ]] || { printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy && ours=yes; }
    export DEBIAN_FRONTEND=noninteractive
    apt-get -o DPkg::Lock::Timeout=300 -qq update
    # Not the package named slurm: that is a network monitor.
    apt-get -o DPkg::Lock::Timeout=300 -qq install -y --no-install-recommends \
        slurmctld slurmd slurm-client munge iproute2 shellcheck >/dev/null
    [[ ! $ours ]] || rm -f $policy
}

hosts() { # the nodes' names; rewritten in place, since the file may be a bind mount
    { grep -v "$MARK\$" /etc/hosts || true; [[ $1 == off ]] || for i in $(seq "$NODES"); do echo "$NET.$i node$i $MARK"; done; } >"$BASE/hosts"
    cat "$BASE/hosts" >/etc/hosts
}

configure() {
    # cred_expire: a requeued job waits for it. SlurmdTimeout: a silent node is down after it. KillWait: from SIGTERM to
    # SIGKILL. Where cgroups cannot be had, processes are found by their parents. The partition urgent takes nodes from
    # jobs of the others, which are requeued: from main after GraceTime, from spare at once.
    local tracking=linuxproc
    [[ -w /sys/fs/cgroup/freezer/cgroup.procs ]] && tracking=cgroup
    cat >"$SLURM_CONF" <<CONF
ClusterName=megalite
SlurmctldHost=$(hostname -s)($NET.254)
SlurmctldPort=16827
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$BASE/munge/run/socket,cred_expire=5
StateSaveLocation=$BASE/state
SlurmdSpoolDir=$BASE/spool/%n
SlurmctldPidFile=$BASE/slurmctld.pid
SlurmdPidFile=$BASE/spool/%n/slurmd.pid
SlurmctldLogFile=$BASE/log/slurmctld.log
SlurmdLogFile=$BASE/log/slurmd-%n.log
ProctrackType=proctrack/$tracking
TaskPlugin=task/affinity
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdTimeout=6
MessageTimeout=5
KillWait=60
UnkillableStepTimeout=90
BatchStartTimeout=20
ReturnToService=2
JobRequeue=1
MinJobAge=3600
NodeName=node[1-$NODES] NodeAddr=$NET.[1-$NODES] Port=17000 CPUs=$CPUS Boards=1 SocketsPerBoard=1 CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=16000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP GraceTime=60
PartitionName=spare Nodes=ALL MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
CONF
    printf 'CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\n' \
        >"$BASE/etc/cgroup.conf"
    echo "export BASE=$BASE SLURM_CONF=$SLURM_CONF PATH=\$PATH:/usr/sbin:/sbin" >"$BASE/env.sh"
}

network() {
    ip link add $BRIDGE type bridge
    ip addr add $NET.254/24 dev $BRIDGE
    ip link set $BRIDGE up
    for i in $(seq "$NODES"); do
        ip netns add "megalite-node$i"
        ip link add "megalite$i" type veth peer name eth0 netns "megalite-node$i"
        ip link set "megalite$i" master $BRIDGE up
        ip -n "megalite-node$i" link set lo up
        ip -n "megalite-node$i" addr add "$NET.$i/24" dev eth0
        ip -n "megalite-node$i" link set eth0 up
    done
}

boot() { # bash is the node's process 1: it outlives slurmd and takes orphans
    mkdir -p "$BASE/spool/$1"
    # shellcheck disable=SC2016  # $0 is the name of the node, in the inner shell
    setsid nsenter --net="/run/netns/megalite-$1" unshare --uts --ipc --pid --fork --kill-child=KILL --mount-proc \
        bash -c 'hostname "$0"; mount -t tmpfs -o size=2g tmpfs /dev/shm; slurmd -D -c -N "$0" & while sleep 3600 & wait $!; do :; done' \
        "$1" </dev/null >>"$BASE/log/$1.out" 2>&1 &
    echo $! >"$BASE/$1.pid"
}

crash() { # killing process 1 of a namespace kills all that is in it
    local outer first
    outer=$(cat "$BASE/$1.pid" 2>/dev/null) || return 0
    first=$(awk '{print $1}' "/proc/$outer/task/$outer/children" 2>/dev/null) || true
    [[ ! $first ]] || kill -KILL "$first" 2>/dev/null || true
    while kill -0 "$outer" 2>/dev/null; do sleep 0.1; done
    rm -f "$BASE/$1.pid"
}

up() {
    [[ ! $(missing) ]] || { echo "missing: $(missing | paste -sd,); cluster.sh install" >&2 && exit 3; }
    [[ ! -e $BASE/env.sh ]] || { echo "$BASE is in use: cluster.sh down" >&2 && exit 4; }
    mkdir -p "$BASE"/{etc,state,spool,log} && command install -d -m 0700 "$BASE/munge" "$BASE/munge/run"
    chmod 755 "$BASE" "$BASE/munge" "$BASE/munge/run" # munge wants its socket to be within everyone's reach
    hosts on
    configure
    head -c 1024 /dev/urandom >"$BASE/munge/key" && chmod 600 "$BASE/munge/key"
    munged --key-file="$BASE/munge/key" --socket="$BASE/munge/run/socket" --pid-file="$BASE/munged.pid" \
        --log-file="$BASE/munge/log" --seed-file="$BASE/munge/seed" --num-threads=4
    network
    slurmctld -c
    for i in $(seq "$NODES"); do boot "node$i"; done
    for _ in $(seq 300); do
        [[ $(sinfo -h -N -t idle -o %N 2>/dev/null | sort -u | wc -l) == "$NODES" ]] && { echo "$BASE/env.sh"; return; }
        sleep 0.2
    done
    sinfo -R -N -l >&2
    tail -n 20 "$BASE"/log/* >&2
    exit 1
}

down() {
    [[ -e $BASE/env.sh ]] || return 0
    timeout 10 scancel --user=root 2>/dev/null || true
    stop slurmctld # first: it would wait for answers of dead nodes
    for i in $(seq "$NODES"); do crash "node$i"; done
    stop munged
    for i in $(seq "$NODES"); do
        ip link del "megalite$i" 2>/dev/null || true
        ip netns del "megalite-node$i" 2>/dev/null || true
    done
    ip link del $BRIDGE 2>/dev/null || true
    find /sys/fs/cgroup/*/slurm_node[1-"$NODES"] -depth -type d -exec rmdir {} \; 2>/dev/null || true
    hosts off
    rm -rf "$BASE/env.sh" "$BASE/state"
}

stop() {
    local pid
    pid=$(cat "$BASE/$1.pid" 2>/dev/null) || return 0
    [[ $(cat "/proc/$pid/comm" 2>/dev/null) == "$1" ]] || return 0
    kill -TERM "$pid"
    for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || return 0; sleep 0.1; done
    kill -KILL "$pid"
}

"$@"
