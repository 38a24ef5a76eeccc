"""Subnet 72 as data and pure functions: what its validators send and pay."""
