"""Hotcell: build sealed cells of real virtual machines, run replication trials in them, score from outside."""

__version__ = "0.1.0"
