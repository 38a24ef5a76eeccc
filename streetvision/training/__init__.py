"""Phase 1: the classifier's losses, the choice of its epoch, its training."""
