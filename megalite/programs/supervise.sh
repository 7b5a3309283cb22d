# shellcheck shell=bash
# Sourced by the job scripts. supervise SAVE COMMAND... runs a training step and requeues the job if the run has saved to
# the folder SAVE because its time is nearly over. With REQUEUE=no the next job of a chain resumes instead.

# The ranks must not see what a login shell exported for another launcher.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
# Since SLURM 22.05 srun does not inherit --cpus-per-task from the job.
[[ ! ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

supervise() {
    local save=$1 owner step earlier status=0 cancelled=
    shift
    earlier=$(cat "$save/to-be-continued" 2>/dev/null)
    rm -f "$save/to-be-continued" # of an earlier job that was killed: it would requeue this one for ever
    owner=$(owner_of "$save")
    "$@" &
    step=$!
    trap 'warn "$save" "$owner" "$step"' USR1
    # SLURM signals the ranks itself at scancel and preemption. After scancel the job is not requeued. After preemption
    # SLURM requeues it, unless the job ended within its GraceTime.
    trap 'cancelled=yes' TERM
    while kill -0 "$step" 2>/dev/null; do # a trapped signal ends `wait`, not the step
        wait "$step" && status=0 || status=$?
    done
    if ((status > 128)); then # it may have ended while a trap ran: ask again for its exit status
        wait "$step" 2>/dev/null && status=0 || status=$(($? == 127 ? status : $?))
    fi
    trap - USR1 TERM
    [[ ! $cancelled ]] && wants_more "$save" || return "$status"
    # If startup takes longer than the time before the warning, the job would be requeued for ever.
    if [[ $earlier && $(cat "$save/to-be-continued" 2>/dev/null) == "$earlier" ]]; then
        echo "error: no step was made, for the second time: a longer --time is needed, or a later --signal" >&2
        return 1
    fi
    # Not the step's status: torchrun reports the signal as a failure, which would stop a chain.
    [[ ${REQUEUE:-yes} == yes ]] || return 0
    scontrol requeue "$SLURM_JOB_ID" && return 0
    echo "error: SLURM does not requeue job $SLURM_JOB_ID: submit the same command again to resume" >&2
    return 1
}

owner_of() { cat "$1/owner.json" 2>/dev/null; } # changes when a run takes the folder, as one of its first acts

# --signal=B:USR1@300 reaches only the batch shell; without --batch, scancel passes it on to the ranks. Before the run has
# taken its lease there may be no step yet, and the signal would be lost or kill a rank.
warn() {
    while kill -0 "$3" 2>/dev/null && [[ $(owner_of "$1") == "$2" ]]; do sleep 1; done
    scancel --signal=USR1 "$SLURM_JOB_ID"
}

# The run was stopped by its time limit, or preempted: SLURM counts a job that ends within its GraceTime as completed.
wants_more() {
    if [[ -e $1/to-be-continued ]]; then
        echo "job $SLURM_JOB_ID is to be continued: $(<"$1/to-be-continued")"
    elif [[ $(scontrol show job "$SLURM_JOB_ID") =~ PreemptTime=[0-9] ]]; then
        echo "job $SLURM_JOB_ID is to be continued: it was preempted"
    else
        return 1
    fi
}
