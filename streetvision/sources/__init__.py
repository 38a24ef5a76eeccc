"""From a user's images and labels, or the renderer's scenes, to rows in the NATIX schema."""
