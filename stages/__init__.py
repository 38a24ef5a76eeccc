"""One thin script per stage of `dvc.yaml`: parse parameters, load, call, write."""
