"""Pure functions from evidence to scorecard."""
