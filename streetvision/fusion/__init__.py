"""Phase 4c, cross-view fusion (CVFM): one logit of all views of an image."""
