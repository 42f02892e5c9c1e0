"""The machine we run on: commands, paths, capacity, accelerator, clock."""
