"""The core's own algorithms, registered through the same entry points that plugins use."""
