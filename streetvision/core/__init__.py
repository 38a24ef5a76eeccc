"""What every room uses and no result depends on: parameters, files, errors, Git, processes, progress."""
