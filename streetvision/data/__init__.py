"""Sources, preparation, the group-disjoint split and its store."""
