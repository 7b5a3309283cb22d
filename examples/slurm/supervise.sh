# shellcheck shell=bash
# Sourced by the job scripts. supervise SAVE COMMAND... runs a job step that trains, and requeues the job when the run
# has saved to the folder SAVE because its time is nearly over. REQUEUE=no leaves that to the next job of a chain.

# What a login shell exported for another launcher must not reach the ranks.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT

supervise() {
    local save=$1 step status=0 cancelled=
    shift
    rm -f "$save/to-be-continued" # of an earlier job that was killed: it would requeue this one for ever
    "$@" &
    step=$!
    # --signal=B:USR1@300 reaches only this shell; without --batch, scancel passes it on to the ranks.
    trap 'scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
    # scancel and preemption reach the ranks by themselves. After the first nobody wants a requeue; after the second
    # SLURM does it.
    trap 'cancelled=yes' TERM
    while kill -0 "$step" 2>/dev/null; do # a trapped signal ends `wait`, not the step
        wait "$step" && status=0 || status=$?
    done
    if ((status > 128)); then # it may have ended while a trap ran: what it ended with is still to be had
        wait "$step" 2>/dev/null && status=0 || status=$(($? == 127 ? status : $?))
    fi
    trap - USR1 TERM
    if [[ -e $save/to-be-continued && ! $cancelled && ${REQUEUE:-yes} == yes ]]; then
        echo "requeue of job $SLURM_JOB_ID: $(<"$save/to-be-continued")"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$status"
}
