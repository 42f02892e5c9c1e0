"""Containment measures and the kill switch."""
