"""What a recipe will take on a pod that one does not hold: memory, traffic and speed."""
