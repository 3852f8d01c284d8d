"""The suite that admits a backend: `slimbridge conformance --backend NAME`."""

from slimbridge.conformance.suite import CASES, Outcome, run_conformance

__all__ = ["CASES", "Outcome", "run_conformance"]
