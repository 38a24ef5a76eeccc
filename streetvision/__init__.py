"""StreetVision: from labelled street images to a deployed, calibrated roadwork detector."""

__version__ = "0.1.0"
