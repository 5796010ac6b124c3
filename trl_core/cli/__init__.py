"""The command `trl-core`."""
