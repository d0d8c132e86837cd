#!/usr/bin/env bash
# What pod.sh has each worker of a TPU slice do:
#
#   worker.sh setup                            Python and the package, every version pinned
#   worker.sh start MAX_RESTARTS [WORD ...]    trains in the background; WORDs as python -m sealion_jax.train takes
#   worker.sh status                           training running | ended CODE | lost
#   worker.sh stop                             has training save and end (exit code 75)
#
# Training starts again after 75 (stopped by a maintenance event, saved) without limit, and after any other failure
# MAX_RESTARTS times at most, but not after 0 (done), nor where its first start ends with 2 (a mistake in the
# command; later it is a failure, such as a worker that does not come). All workers do the same by themselves: when
# one fails the others notice, end too, and all meet again.
set -euo pipefail
cd "$(dirname "$0")/../.."
state=runs/tpu_vm
mkdir -p "$state"

setup() {
    local python
    python=$(newest_python)
    if [[ -z $python ]]; then
        # TPU VMs of Ubuntu 22.04 have Python 3.10, and 3.11 among their packages.
        sudo apt-get -qq update
        sudo apt-get -qq install --yes python3.11-venv
        python=python3.11
    fi
    PYTHON=$python launch/container/install.sh tpu
}

newest_python() {
    local python
    for python in python3.13 python3.12 python3.11 python3; do
        if "$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
}

start() {
    local k
    if is_running; then
        echo "training runs already on $(hostname)"
        return
    fi
    rm -f "$state/ended"
    setsid launch/tpu_vm/worker.sh keep_training "$@" </dev/null >>"$state/log" 2>&1 &
    for ((k = 0; k < 100; k++)); do
        if is_running || [[ -s $state/ended ]] || ! kill -0 $! 2>/dev/null; then break; fi
        sleep 0.1
    done
    if ! is_running && [[ ! -s $state/ended ]]; then
        echo "error: training did not start on $(hostname); pod.sh logs may have the reason" >&2
        return 1
    fi
    echo "training started on $(hostname)"
}

# The lock is held as long as training is kept going, and falls with its holder however that ends.
is_running() {
    ! flock --shared --nonblock "$state/lock" true
}

keep_training() {
    local left=$1 code=75 child='' heard stopped='' first=yes
    shift
    export JAX_PLATFORMS=tpu,cpu # without a TPU JAX would train on the CPU
    exec 9>"$state/lock"
    flock --timeout 10 9 || exit 2 # a look at whether training runs holds it for a moment
    echo $$ >"$state/pid"
    trap 'stopped=yes; heard=yes; kill -TERM "$child" 2>/dev/null || true' TERM
    while [[ -z $stopped ]]; do
        echo "=== $(date --utc +%FT%TZ) starting on $(hostname)"
        # A machine that was restarted takes some minutes to come back.
        .venv/bin/python -m sealion_jax.train "$@" --cluster tpu-vm --join-timeout-seconds 1800 9>&- &
        child=$!
        heard=yes
        while [[ -n $heard ]]; do # a signal ends the wait early, and training may still be saving
            heard='' code=0
            wait "$child" || code=$?
        done
        echo "=== $(date --utc +%FT%TZ) ended with exit code $code"
        [[ $code == 0 || -n $stopped ]] && break
        [[ $code == 2 && -n $first ]] && break
        first=''
        if [[ $code != 75 ]] && ((left-- == 0)); then
            echo "=== failed too often; see above. pod.sh run starts it again"
            break
        fi
        sleep "${RESTART_SECONDS:-10}" 9>&- & # beside the wait, so that a signal is heard
        wait $! || true
    done
    echo "$code" >"$state/ended"
}

status() {
    if is_running; then
        echo "training running"
    elif [[ -s $state/ended ]]; then
        echo "training ended $(<"$state/ended")"
    else
        echo "training lost"
    fi
}

stop() {
    if is_running; then
        kill -TERM "$(<"$state/pid")"
        echo "training is saving on $(hostname)"
    fi
}

case ${1:-} in
setup | status | stop) "$1" ;;
start | keep_training) "$@" ;;
*)
    sed -n '2,7s/^# \{0,1\}//p' launch/tpu_vm/worker.sh >&2
    exit 2
    ;;
esac
