"""Metrics, group intervals, the evaluation report and its plots."""
