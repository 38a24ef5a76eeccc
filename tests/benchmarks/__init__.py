"""Speed against what one would pick instead: `make bench`, or `make bench ONLY=sweep`."""
