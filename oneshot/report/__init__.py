"""What a run leaves behind for people: the run folder, report.json, tables and one HTML page."""
