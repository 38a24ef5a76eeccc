"""Rows to splits: reduced, checked, grouped by place and near-duplicate, divided without a shared group."""
