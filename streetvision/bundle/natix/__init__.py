"""The detector for Bittensor Subnet 72: written into a subnet checkout, and checked as a miner runs it."""
