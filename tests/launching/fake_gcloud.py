"""In the place of gcloud: queued resources whose states are played, and workers that are folders here.

It appends each call's words to `calls.jsonl`. `states` has the states still to come, one a line; the last
one stays, and an empty one, for no request, until there is one. `failing` has the actions of calls that find
no network, one a line. Remote commands run in each worker's home by `bash -c`, as sshd does it, with a python
that trains nothing: see REMOTE_PYTHON.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(os.environ["FAKE_GCLOUD"])
WORKERS = 2

# As `python3.13` of a worker it makes an environment whose python is this script too. As training it writes
# down its words and ends with the next code of `codes`, or waits for SIGTERM and ends with 75, or is lost
# together with what keeps it going.
REMOTE_PYTHON = r"""#!/usr/bin/env bash
case "$*" in
"-c import ensurepip"*) ;;
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip "*) printf '%s\n' "$@" >>"$HOME/pip" ;;
"-m sealion_jax.train "*)
    trap 'echo saved >>"$HOME/saved"; exit 75' TERM
    printf '%s\0' "$@" >"$HOME/words"
    echo started >>"$HOME/started"
    code=$(head -n 1 "$HOME/codes")
    sed -i 1d "$HOME/codes"
    [[ $code != lost ]] || kill -KILL "$PPID" $$
    [[ $code == waits ]] || exit "$code"
    sleep 60 & wait
    ;;
*) exit 99 ;;
esac
"""


def worker_home(node: str, worker: int) -> Path:
    """The folder that is the home of a worker; it is made on first use."""
    home = FOLDER / f"{node}-{worker}"
    if not home.exists():
        (home / "bin").mkdir(parents=True)
        python = home / "bin" / "python3.13"
        python.write_text(REMOTE_PYTHON)
        python.chmod(0o755)
        given = FOLDER / "codes"
        (home / "codes").write_text(given.read_text() if given.exists() else "0\n")
    return home


def main(words: list[str]) -> int:
    with (FOLDER / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(words) + "\n")
    words = [word for word in words if word != "--quiet"]
    option = {
        word: value for word, value in zip(words, [*words[1:], ""], strict=True) if word.startswith("--")
    }
    option |= dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
    kind, action, *names = words[2:]
    if _has_no_network(action):
        print("ERROR: gcloud crashed (ServerNotFoundError): no network", file=sys.stderr)
        return 1
    if kind == "queued-resources":
        return _queued_resources(action)
    workers = range(WORKERS) if option["--worker"] == "all" else [int(option["--worker"])]
    if action == "scp":
        node = names[1].removesuffix(":")
        for worker in workers:
            shutil.copy(names[0], worker_home(node, worker))
        return 0
    assert action == "ssh", words
    return max(_remote(names[0], worker, option) for worker in workers)


def _queued_resources(action: str) -> int:
    states = FOLDER / "states"
    left = states.read_text().split("\n") if states.exists() else [""]
    if action == "describe" and not left[0]:
        print("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource", file=sys.stderr)
        return 1
    if action == "create" and left[0]:
        print("ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS", file=sys.stderr)
        return 1
    if action in ("describe", "create") and len(left) > 1:
        states.write_text("\n".join(left[1:]))
    if action == "describe":
        print("WARNING: a newer gcloud is available", file=sys.stderr)
        print(left[0])
    return 0


def _has_no_network(action: str) -> bool:
    failing = FOLDER / "failing"
    left = failing.read_text().split() if failing.exists() else []
    if action not in left:
        return False
    left.remove(action)
    failing.write_text("\n".join(left))
    return True


def _remote(node: str, worker: int, option: dict[str, str]) -> int:
    home = worker_home(node, worker)
    env = {"HOME": str(home), "PATH": f"{home / 'bin'}:{os.environ['PATH']}", "RESTART_SECONDS": "0.1"}
    command = ["bash", "-c", option["--command"]]
    if "--output-directory" in option:
        with (Path(option["--output-directory"]) / f"{worker}.log").open("w") as log:
            return subprocess.run(command, cwd=home, env=env, stdout=log, timeout=60, check=False).returncode
    return subprocess.run(command, cwd=home, env=env, timeout=60, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
