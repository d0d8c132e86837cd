"""Watching a run: heartbeats, hangs, and processes that answer no more."""

from sealion_jax.watching.activity import READING, Activity, Doing
from sealion_jax.watching.config import WatchConfig
from sealion_jax.watching.ends import Ends
from sealion_jax.watching.watch import Watch

__all__ = ["READING", "Activity", "Doing", "Ends", "Watch", "WatchConfig"]
