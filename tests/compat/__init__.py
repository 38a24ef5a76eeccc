"""The miner's detector in the environments that the subnet has had: `make compat`."""
