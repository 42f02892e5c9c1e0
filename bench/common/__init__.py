"""What the benchmarks share: percentiles, tables, what a process holds, a server, a sealed workshop."""
