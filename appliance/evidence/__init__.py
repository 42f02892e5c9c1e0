"""Append-only evidence: journal, capture, disk inspection, sealed bundle."""
