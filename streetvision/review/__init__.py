"""What a reviewer asks of data and of changes: drift, doubtful labels, leakage."""
