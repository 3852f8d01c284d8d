"""Reports: records, terminal tables, one HTML file."""

from slimbridge.report.records import (
    Comparison,
    EpochRecord,
    LatencyRecord,
    RunReport,
    StageRecord,
    Verdict,
    read_report,
)

__all__ = ["Comparison", "EpochRecord", "LatencyRecord", "RunReport", "StageRecord", "Verdict", "read_report"]
