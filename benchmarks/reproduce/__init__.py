"""What ``benchmarks/paper.py`` is made of: cells to measure, the measuring, statistics, claims, page and figures."""
