"""Studies: many runs of one plan, with some of its values varied, and the curves of the metric against MACs."""

from slimbridge.report.study_records import Study, StudyRun, read_study
from slimbridge.study.runs import run_study

__all__ = ["Study", "StudyRun", "read_study", "run_study"]
