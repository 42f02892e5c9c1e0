"""Scripts that the host sends into a guest through the qga, as data files. Nothing here is imported."""
