"""Subnet 72 as data and pure functions: what its validators sent, era by era, and what they paid."""
