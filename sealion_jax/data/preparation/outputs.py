"""What is at a store's output before `prepare` builds it: finished, in the way, or to be thrown away."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sealion_jax.data import files
from sealion_jax.data.preparation.encoding import HoldOut
from sealion_jax.data.preparation.job import Job, content_key
from sealion_jax.data.store.growing_file import explain_write_errors, lock_folder
from sealion_jax.data.store.layout import HELD_OUT, discard, leftovers, refuse_other_files, tidy
from sealion_jax.data.store.manifest import Manifest
from sealion_jax.data.store.remote import discard_remote
from sealion_jax.data.store.token_store import TokenStore, sha256_of
from sealion_jax.errors import UserError


def work_folder(output: str, work_dir: Path | None) -> Path:
    """Where the store is put together: the output itself, unless that is in a bucket."""
    if not files.is_remote(output):
        return Path(output)
    return work_dir or files.user_cache() / "prepare" / hashlib.sha256(output.encode()).hexdigest()[:16]


def overwrite(output: str, folder: Path) -> None:
    """Removes what is at the output and in the folder where it is put together, finished or not.

    Raises:
        UserError: a store cannot be made there anyway; then nothing is removed.
    """
    refuse_other_files(folder)
    discard(folder)
    if files.is_remote(output):
        discard_remote(output)


def finished(output: str, job: Job) -> Manifest:
    """The manifest of the finished store at `output`; UserError unless it is this job's, whole.

    What a writer that was killed after the manifest still had to do is done.
    """
    manifest = TokenStore.open(output).manifest
    _refuse_another_job(output, manifest, job)
    folder, hold_out = Path(output), job.options.hold_out
    if files.is_remote(output) or not leftovers(folder, manifest):
        _require_held_out(output, manifest, hold_out)
        return manifest
    with lock_folder(folder):
        if hold_out is not None and (folder / HELD_OUT).exists() and not files.exists(hold_out.file):
            with explain_write_errors(hold_out.file):
                files.copy_whole(folder / HELD_OUT, hold_out.file)
        _require_held_out(output, manifest, hold_out)
        tidy(folder, manifest)
    return manifest


def _refuse_another_job(output: str, manifest: Manifest, job: Job) -> None:
    if content_key(manifest.tokenizer.fingerprint, manifest.settings, manifest.sources) == job.key():
        return
    options = job.options.settings()
    differ = "of other inputs"
    if manifest.tokenizer.fingerprint != job.tokenizer.fingerprint:
        differ = "of another tokenizer"
    elif manifest.settings != options:
        names = dict.fromkeys([*options, *manifest.settings])
        wrong = [name for name in names if manifest.settings.get(name) != options.get(name)]
        differ = f"made with other options ({', '.join(wrong)})"
    raise UserError(f"{output} is a finished token store {differ}; choose another output, or add --overwrite")


def _require_held_out(output: str, manifest: Manifest, wanted: HoldOut | None) -> None:
    held_out = manifest.held_out_file
    if held_out is None or wanted is None:
        return
    if not files.exists(wanted.file) or sha256_of(wanted.file) != held_out.sha256:
        raise UserError(
            f"{wanted.file} is not the file of held-out documents that belongs to {output} (they are not in "
            "the store); bring it back, or add --overwrite to make both again"
        )
