"""Metrics, intervals that count groups, paired tests."""
