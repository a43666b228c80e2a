"""Published post-hoc repairs, re-implemented from their papers, to compare with; each a plain function.

A state is a model's ``state_dict``: name -> tensor. States go in, a new state comes out, and nothing is changed in
place unless the docstring says so. A benchmark imports them with its own folder last on ``sys.path``.
"""
