"""Images of a split: store, decoding safely, transforms, augmentation, views, loaders."""
