"""Device code of every architecture."""
