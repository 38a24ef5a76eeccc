"""From logits to decisions: thresholds, calibrators and the deployed policy."""
