"""What a run will need, from a config.json and the settings alone: nothing here loads torch or a weight."""
