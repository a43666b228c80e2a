"""The embedded toy world: a made-up language in which safety can be lost and repaired in seconds on a CPU."""
