"""The commands of `python -m streetvision`, by what they are about; each registers itself."""
