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
#   pod.sh keep   (as create, with -- and the command)            all of it, anew after each preemption
#
# More options: --slices K (joined by the data centre's network), --project P, --runtime-version R (of the VMs),
# --service-account A (one that may use the bucket), --wait-minutes M (for the slice; 720), --max-restarts N (of
# training, after failures; 20). The page is docs/tpu_vm.md.
set -euo pipefail

usage() {
    sed -n '2,15s/^# \{0,1\}//p' "$0" >&2
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
common=(--quiet) tier=''
while (($# > 0)) && [[ $1 != -- ]]; do
    case $1 in
    --spot | --reserved) tier=$1 && shift && continue ;;
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
common+=(--zone "$zone")
nodes=("$name")
if ((slices > 1)); then
    nodes=()
    for ((k = 0; k < slices; k++)); do nodes+=("$name-$k"); done
fi

tpus() { gcloud compute tpus "$@" "${common[@]}"; }
say() { echo "$(date +%H:%M:%S) $*" >&2; }

# One of the states of a queued resource, or nothing where there is none.
state() { tpus queued-resources describe "$name" --format='value(state.state)' 2>/dev/null || true; }

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

create() {
    local deadline=$((SECONDS + 60 * minutes)) now shown=''
    if [[ -z $(state) ]]; then
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
        tpus queued-resources create "$name" "${words[@]}" || fail "gcloud refused; see above"
    fi
    while true; do
        now=$(state)
        [[ $now == "$shown" ]] || say "$name is ${now:-unknown}"
        shown=$now
        case $now in
        ACTIVE) return ;;
        '' | FAILED | SUSPENDED)
            say "$name will not come up: pod.sh delete, then create again" && return 1 ;;
        esac
        ((SECONDS < deadline)) || fail "$name is ${now:-unknown} after $minutes minutes, and stays in the queue; \
run pod.sh create again to go on waiting, or pod.sh delete"
        sleep "${POLL_SECONDS:-30}"
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
setup() {
    local packed node
    packed=$(mktemp -d)
    (cd "$root" && files | COPYFILE_DISABLE=1 tar -czf "$packed/sealion_jax.tar.gz" --null -T -) || return
    for node in "${nodes[@]}"; do
        tpus tpu-vm scp "$packed/sealion_jax.tar.gz" "$node:" --worker=all || return
    done
    rm -r "$packed"
    on_all rm -rf sealion_jax/sealion_jax sealion_jax/kernels sealion_jax/configs &&
        on_all mkdir -p sealion_jax &&
        on_all tar -xzf sealion_jax.tar.gz -C sealion_jax &&
        worker setup
}

run() { worker start "$restarts" "$@"; }

# Exits with training's code; returns 1 when the slice is gone, or a machine was restarted.
wait_for_end() {
    local told codes unheard=0
    while true; do
        told=$(worker status) || told=''
        codes=$(sed -n 's/^training ended //p' <<<"$told" | sort -u | tr '\n' ' ')
        if [[ -z $told ]]; then
            [[ $(state) == ACTIVE ]] || return 1
            ((++unheard < 10)) || fail "workers of $name do not answer, though it is ACTIVE"
        elif [[ " $codes" == *" 2 "* ]]; then
            fail "training was refused; pod.sh logs has the reason" 2
        elif [[ $told == *"training lost"* ]]; then
            say "training does not run on every worker any more" && return 1
        elif [[ $told == *"training running"* ]]; then
            unheard=0
        else
            say "training ended with exit code $codes"
            # All the same, or the first that is not 0.
            for code in $codes; do ((code == 0)) || exit "$code"; done
            exit 0
        fi
        sleep "${POLL_SECONDS:-60}"
    done
}

logs() {
    local node log=sealion_jax/runs/tpu_vm/log
    if [[ -z $output ]]; then
        tpus tpu-vm ssh "${nodes[0]}" --worker=0 --command="tail -n 100 -F $log"
        return
    fi
    for node in "${nodes[@]}"; do
        mkdir -p "$output/$node"
        tpus tpu-vm ssh "$node" --worker=all --command="cat $log" --output-directory "$output/$node"
    done
    say "logs are in $output"
}

delete() { tpus queued-resources delete "$name" --force; }

keep() {
    while true; do
        case $(state) in
        FAILED | SUSPENDED) delete ;;
        esac
        if create; then
            # Where this fails a machine was taken away meanwhile, or the wait tells what is wrong.
            worker status >/dev/null 2>&1 || setup || say "setting up failed"
            run "$@" || say "training did not start on every worker"
            wait_for_end || say "starting again"
        fi
        sleep "${POLL_SECONDS:-30}"
    done
}

case $action in
wait) wait_for_end || fail "$name is $(state): where it is ACTIVE pod.sh run goes on, else delete and create it" ;;
stop) worker stop ;;
*) "$action" "$@" ;;
esac
