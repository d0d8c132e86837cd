"""Measuring each node before a long run, and naming those that are slow."""
