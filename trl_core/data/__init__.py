"""Datasets: formats, rendering, checks."""
