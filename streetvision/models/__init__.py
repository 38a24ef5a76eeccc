"""Backbones, the classifier and its training."""
