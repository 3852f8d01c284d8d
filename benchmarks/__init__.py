"""Measured comparisons with other toolkits: `python -m benchmarks` runs all cases and writes RESULTS.md."""
