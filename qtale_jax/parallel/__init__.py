"""Device meshes and the one table that maps logical axis names to mesh axes."""
