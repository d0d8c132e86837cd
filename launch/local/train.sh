#!/usr/bin/env bash
# Trains with N processes on this machine: launch/local/train.sh N [--] [RECIPE] [--some.field VALUE ...]
#
# Each process gets a number; process 0 coordinates. On CPUs they talk through gloo, so a run over several hosts
# can be tried on a laptop:
#
#   XLA_FLAGS=--xla_force_host_platform_device_count=2 launch/local/train.sh 2 cpt_tiny
#
# Process 0 prints to the terminal, the others to <log folder>/process-<n>.log (LOG_DIR, default runs/logs). When
# one ends with an error the others are stopped. Ctrl-C and SIGTERM reach all: they save and exit 75.
set -euo pipefail

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 501)); then
    echo "error: this script needs bash 5.1 or newer, and this is $BASH_VERSION; install one, and put it first in PATH" >&2
    exit 2
fi
if [[ $# -lt 1 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: launch/local/train.sh NUM_PROCESSES [--] [RECIPE] [--some.field VALUE ...]" >&2
    exit 2
fi
count=$1
shift
[[ ${1:-} != -- ]] || shift
logs=${LOG_DIR:-runs/logs}
if ! mkdir -p "$logs"; then
    echo "error: the folder $logs could not be made; set LOG_DIR to one that you may write" >&2
    exit 2
fi
port=${PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}

declare -A running
stop() { kill -TERM "${!running[@]}" 2>/dev/null || true; }
trap stop INT TERM

for ((n = 0; n < count; n++)); do
    command=(python -m sealion_jax.train "$@"
        --coordinator-address "127.0.0.1:$port" --num-processes "$count" --process-id "$n")
    if ((n == 0)); then
        "${command[@]}" &
    else
        "${command[@]}" >"$logs/process-$n.log" 2>&1 &
    fi
    running[$!]=$n
done

# The first error is the script's own, and every process is waited for: what they save must be whole.
status=0
while ((${#running[@]} > 0)); do
    code=0
    wait -n -p ended "${!running[@]}" || code=$?
    [[ -n ${ended:-} ]] || continue # a signal ended the wait, not a process
    unset "running[$ended]"
    if ((code != 0 && status == 0)); then
        status=$code
        stop
    fi
done
exit "$status"
