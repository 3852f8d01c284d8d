"""Deployment: measured latency."""
