#!/usr/bin/env bash
# Trains on Cloud TPU VMs: asks for a slice (or several), sets it up, runs, and gives it back.
#
#   pod.sh create --name run1 --zone us-east5-a --accelerator-type v5p-128 [--spot | --reserved]
#   pod.sh setup  --name run1 --zone us-east5-a
#   pod.sh run    --name run1 --zone us-east5-a -- cpt_27b --run-dir gs://bucket/run1
#   pod.sh wait   --name run1 --zone us-east5-a                   until it is done; its exit code
#   pod.sh logs   --name run1 --zone us-east5-a [--output DIR]    follows worker 0, or collects all into DIR
#   pod.sh stop   --name run1 --zone us-east5-a                   saves and ends
#   pod.sh delete --name run1 --zone us-east5-a
#   pod.sh keep   (as create, with -- and the command)            all of it, anew after each preemption; when
#                 training has ended logs are collected, and the slice is given back (not with --keep-slice)
#
# More options: --slices K (joined by the data centre's network), --project P, --runtime-version R (of the VMs),
# --service-account A (one that may use the bucket), --wait-minutes M (for the slice; 720, and keep waits on),
# --max-restarts N (of training, after failures; 20). The page is docs/tpu_vm.md.
set -euo pipefail

usage() {
    sed -n '2,16s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

fail() {
    echo "error: $1" >&2
    exit "${2:-1}"
}

root=$(cd "$(dirname "$0")/../.." && pwd)
action=${1:-}
[[ $action =~ ^(create|setup|run|wait|logs|stop|delete|keep)$ ]] || usage
shift
name='' zone='' type='' runtime='' account='' output='' slices=1 minutes=720 restarts=20
common=(--quiet) tier='' keep_slice=''
while (($# > 0)) && [[ $1 != -- ]]; do
    case $1 in
    --spot | --reserved) tier=$1 && shift && continue ;;
    --keep-slice) keep_slice=yes && shift && continue ;;
    esac
    (($# > 1)) || fail "$1 needs a value" 2
    case $1 in
    --name) name=$2 ;;
    --zone) zone=$2 ;;
    --project) common+=(--project "$2") ;;
    --accelerator-type) type=$2 ;;
    --runtime-version) runtime=$2 ;;
    --service-account) account=$2 ;;
    --slices) slices=$2 ;;
    --wait-minutes) minutes=$2 ;;
    --max-restarts) restarts=$2 ;;
    --output) output=$2 ;;
    *) fail "unknown option $1" 2 ;;
    esac
    shift 2
done
[[ ${1:-} != -- ]] || shift
[[ $name =~ ^[a-z][-a-z0-9]*$ ]] || fail "--name: lower-case letters, digits and hyphens, such as run1" 2
[[ -n $zone ]] || fail "--zone is missing, such as us-east5-a" 2
for number in "$slices" "$minutes" "$restarts"; do
    [[ $number =~ ^[0-9]+$ ]] || fail "expected a whole number instead of $number" 2
done
for word; do
    case $word in
    --cluster | --join-timeout-seconds | --coordinator-address | --num-processes | --process-id | \
        --cluster=* | --join-timeout-seconds=* | --coordinator-address=* | --num-processes=* | --process-id=*)
        fail "${word%%=*} is set by worker.sh, as a TPU VM needs it; leave it out" 2 ;;
    esac
done
common+=(--zone "$zone")
nodes=("$name")
if ((slices > 1)); then
    nodes=()
    for ((k = 0; k < slices; k++)); do nodes+=("$name-$k"); done
fi

tpus() { gcloud compute tpus "$@" "${common[@]}"; }
say() { echo "$(date +%H:%M:%S) $*" >&2; }
pause() { sleep "${POLL_SECONDS:-$1}"; }

# Whether to ask gcloud again where it does not answer, as without a network.
patient=''

# One of the states of a queued resource, or ABSENT where there is none.
state() {
    local told
    until told=$(tpus queued-resources describe "$name" --format='value(state.state)' 2>&1); do
        if [[ $told == *NOT_FOUND* ]]; then echo ABSENT && return; fi
        [[ -n $patient ]] || fail "gcloud does not tell whether there is a $name: $told"
        say "gcloud does not tell how $name is, and is asked again: ${told##*$'\n'}"
        pause 30
    done
    # Not the warnings beside it.
    grep -xE '[A-Z_]+' <<<"$told" | tail -n 1 || true
}

# Whether a command succeeded, of ten times at most.
insist() {
    local k
    for ((k = 0; k < 10; k++)); do
        if "$@"; then return; fi
        pause 30
    done
    return 1
}

# Has every worker of every slice run these words; all slices at a time.
on_all() {
    local command node jobs=() failed=0
    printf -v command '%q ' "$@"
    for node in "${nodes[@]}"; do
        tpus tpu-vm ssh "$node" --worker=all --command="$command" &
        jobs+=($!)
    done
    for job in "${jobs[@]}"; do wait "$job" || failed=1; done
    return "$failed"
}

worker() { on_all bash sealion_jax/launch/tpu_vm/worker.sh "$@"; }

requested=''
create() {
    local deadline=$((SECONDS + 60 * minutes)) now shown=''
    now=$(state) || exit
    if [[ $now == ABSENT ]]; then
        [[ -n $type ]] || fail "--accelerator-type is missing, such as v5p-128 or v6e-64" 2
        [[ -n $runtime ]] || runtime=$(usual_runtime) || exit 2
        local words=(--accelerator-type "$type" --runtime-version "$runtime")
        [[ -z $tier ]] || words+=("$tier")
        [[ -z $account ]] || words+=(--service-account "$account")
        if ((slices > 1)); then
            words+=(--node-count "$slices" --node-prefix "$name")
        else
            words+=(--node-id "$name")
        fi
        if ! tpus queued-resources create "$name" "${words[@]}"; then
            # A later time the same words were right before.
            [[ -n $requested ]] || fail "gcloud refused; see above"
            say "gcloud refused, and is asked again" && return 1
        fi
    fi
    requested=yes patient=yes
    while true; do
        now=$(state)
        [[ $now == "$shown" ]] || say "$name is ${now:-unknown}"
        shown=$now
        case $now in
        ACTIVE) return ;;
        ABSENT | FAILED | SUSPENDED)
            say "$name will not come up: pod.sh delete, then create again" && return 1 ;;
        esac
        [[ $action == keep ]] || ((SECONDS < deadline)) || fail "$name is ${now:-unknown} after $minutes minutes, \
and stays in the queue; run pod.sh create again to go on waiting, or pod.sh delete"
        pause 30
    done
}

usual_runtime() {
    case $type in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "--runtime-version is missing: which one $type needs is on Google's page on TPU software" 2 ;;
    esac
}

# The checkout's files, each followed by a zero: what git knows or could know, also changes that are not committed;
# without git all but environments and runs.
files() {
    local path
    if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
        git ls-files -z --cached --others --exclude-standard |
            while IFS= read -r -d '' path; do [[ ! -e $path ]] || printf '%s\0' "$path"; done
    else
        find . \( -name '.*' ! -name . -o -name runs -o -name build \) -prune -o -type f -print0
    fi
}

# Each step ends it where it fails, also when it is asked whether it succeeded.
setup() (
    packed=$(mktemp -d) || return
    trap 'rm -r "$packed"' EXIT
    (cd "$root" && files | COPYFILE_DISABLE=1 tar -czf "$packed/sealion_jax.tar.gz" --null -T -) || return
    for node in "${nodes[@]}"; do
        tpus tpu-vm scp "$packed/sealion_jax.tar.gz" "$node:" --worker=all || return
    done
    on_all rm -rf sealion_jax/sealion_jax sealion_jax/kernels sealion_jax/configs &&
        on_all mkdir -p sealion_jax &&
        on_all tar -xzf sealion_jax.tar.gz -C sealion_jax &&
        worker setup
)

# Sets up if there are workers that are not; where one does not answer nobody knows.
setup_if_bare() {
    local told
    # shellcheck disable=SC2016
    told=$(on_all bash -c '[[ -e sealion_jax/.venv/installed ]] || echo bare') || return
    ! grep -qx bare <<<"$told" || setup
}

run() { worker start "$restarts" "$@"; }

# Waits for the exit code of training, which is `ended` then; returns 1 when the slice is gone, or a machine was
# restarted.
ended=''
wait_for_end() {
    local told codes code unheard=0
    patient=yes
    while true; do
        told=$(worker status) || told=''
        codes=$(sed -n 's/^training ended //p' <<<"$told" | sort -u | tr '\n' ' ')
        if [[ $told != *training* ]]; then
            [[ $(state) == ACTIVE ]] || return 1
            ((++unheard < 10)) || { say "workers of $name do not answer, though it is ACTIVE" && return 1; }
        elif [[ $told == *"training lost"* ]]; then
            # The others miss that worker: what they end with says nothing more.
            say "training does not run on every worker any more" && return 1
        elif [[ " $codes" == *" 2 "* ]]; then
            say "training was refused; pod.sh logs has the reason"
            ended=2 && return
        elif [[ $told == *"training running"* ]]; then
            unheard=0
        else
            say "training ended with exit code $codes"
            # All the same, or the first that is not 0.
            for code in $codes; do
                ended=$code
                ((code == 0)) || break
            done
            return
        fi
        pause 60
    done
}

logs() {
    local node log=sealion_jax/runs/tpu_vm/log
    if [[ -z $output ]]; then
        tpus tpu-vm ssh "${nodes[0]}" --worker=0 --command="tail -n 100 -F $log"
        return
    fi
    for node in "${nodes[@]}"; do
        mkdir -p "$output/$node" || return
        tpus tpu-vm ssh "$node" --worker=all --command="cat $log" --output-directory "$output/$node" || return
    done
    say "logs are in $output"
}

delete() { tpus queued-resources delete "$name" --force; }

is_given_back() { delete || [[ $(state) =~ ^(ABSENT|DELETING)$ ]]; }

keep() {
    local trained='' refused=0 failed=0
    patient=yes
    while true; do
        case $(state) in
        FAILED | SUSPENDED) delete || say "deleting it failed, and is tried again" ;;
        esac
        if create; then
            if setup_if_bare; then
                run "$@" || say "training did not start on every worker"
                if ! wait_for_end; then
                    trained=yes refused=0
                # The first time it is a mistake in the command; later on perhaps a machine's fault.
                elif [[ $ended != 2 || -z $trained ]] || ((++refused == 3)); then
                    break
                fi
            else
                [[ -n $trained ]] || ((++failed < 20)) ||
                    fail "setting up failed 20 times; see above. $name goes on costing until pod.sh delete"
                say "setting up failed, or a worker does not answer"
            fi
            say "starting again"
        fi
        pause 30
    done
    output=${output:-runs/logs}
    insist logs || say "logs could not be collected"
    if [[ -n $keep_slice ]]; then
        say "$name is kept, and goes on costing until pod.sh delete"
    else
        insist is_given_back || fail "$name could not be given back: it goes on costing until pod.sh delete"
    fi
    exit "$ended"
}

case $action in
wait)
    wait_for_end || fail "$name is $(state): where it is ACTIVE pod.sh run goes on, else delete and create it"
    exit "$ended"
    ;;
stop) worker stop ;;
*) "$action" "$@" ;;
esac
