"""A recipe made real: its parts, where it goes on from, what happens beside training, and the run itself."""
