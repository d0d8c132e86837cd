"""The token store: its files, written and read."""
