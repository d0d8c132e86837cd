"""The fields that rows of texts, of chats and of pairs have, and what to do where they have others."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sealion_jax.data.store.manifest import StoreKind
from sealion_jax.errors import UserError

MESSAGES, PROMPT, COMPLETION, TOOLS = "messages", "prompt", "completion", "tools"
CHOSEN, REJECTED = "chosen", "rejected"


def content_fields(kind: StoreKind, *, text: str) -> tuple[str, ...]:
    """The fields that are looked at for a row's content; `text` is the name of the text's."""
    if kind == "text":
        return (text,)
    return (MESSAGES, PROMPT, COMPLETION, TOOLS) if kind == "chats" else (PROMPT, CHOSEN, REJECTED, TOOLS)


def hint(kind: StoreKind, present: Collection[str]) -> str:
    """What to do where rows with these fields are of another kind, as the end of a sentence; or nothing."""
    if CHOSEN in present or REJECTED in present:
        found = "pairs"
    elif MESSAGES in present or PROMPT in present:
        found = "chats"
    else:
        found = "text" if "text" in present else kind
    if found == kind:
        return ""
    return f"; for text, leave out --kind {kind}" if found == "text" else f"; for {found}, add --kind {found}"


def require_columns(where: str, column: str, known: Sequence[str], kind: StoreKind, *, text: str) -> None:
    """UserError unless rows with these fields can be of this kind.

    Args:
        where: what has the fields.
        column: what a field is called there.
        text: the name of the text's field.
    """
    if kind == "text":
        if text not in known:
            raise UserError(
                f"{where} has no {column} {text!r}; name one of {list(known)} with --text-field"
                f"{hint(kind, known)}"
            )
        return
    needed = (PROMPT, CHOSEN, REJECTED) if kind == "pairs" else (PROMPT, COMPLETION)
    missing = [name for name in needed if name not in known]
    if missing and not (kind == "chats" and MESSAGES in known):
        either = f"{MESSAGES}, or " if kind == "chats" else ""
        raise UserError(
            f"{where} has no {column} {missing[0]!r}; {kind} have {either}{', '.join(needed[:-1])} and "
            f"{needed[-1]}, and it has {list(known)}{hint(kind, known)}"
        )
