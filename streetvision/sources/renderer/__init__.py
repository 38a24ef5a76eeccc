"""Street scenes drawn by a seed, with and without roadwork."""
