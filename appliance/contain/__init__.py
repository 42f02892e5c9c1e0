"""Containment measures: none yet. The kill switch is not among them: it is the pipeline's."""
