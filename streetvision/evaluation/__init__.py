"""What a bundle is worth: on VAL_TEST, under challenge, on a user's own images, in a miner's log."""
