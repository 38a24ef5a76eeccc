"""The network: backbones and their weights, adapters, optimisers, the training loop."""
