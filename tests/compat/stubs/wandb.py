"""Nothing is reported: the validator's module only has to import it."""
