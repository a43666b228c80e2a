"""What a model answers, judged: refusals by keywords, exact matches, and rates with intervals."""
