"""What each part adds, measured: tables written by commands that are kept."""
