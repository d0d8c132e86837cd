"""Conversations: checked rows, Gemma 3's format straight to token ids, and the same as a Jinja template."""
