"""Numbers drawn: pictures, and the curves that DVC draws as data."""
