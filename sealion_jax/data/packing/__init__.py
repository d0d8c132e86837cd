"""Token stores as rows of a fixed length, each computed from its number and small index arrays alone."""
