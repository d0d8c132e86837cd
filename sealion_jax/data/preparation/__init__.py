"""From inputs to a finished token store."""
