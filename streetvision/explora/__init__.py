"""Phase 4a: the backbone adapted to street images without labels, and the probes that judge it."""
