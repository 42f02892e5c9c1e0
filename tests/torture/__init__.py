"""The crash campaign: a real server with real machines, broken at seeded moments, and what must hold after each.

``make torture`` runs the long one; :mod:`tests.trial.test_crash` runs a few points of it in every ``make test``.
"""
