"""What people name as inputs: text and record files, row by row."""
