"""The clean-ups that export/graph.py puts in order: one file each, its algebra in the header."""
