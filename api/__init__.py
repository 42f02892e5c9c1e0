"""The control plane: HTTP over a unix socket and loopback. Routes hold no logic."""
