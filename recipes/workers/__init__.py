"""Who does work that maps over many items, processes here or actors on a Ray cluster, and where they lie."""
