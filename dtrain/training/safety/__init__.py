"""What protects a run: bad steps refused, hangs found, stops obeyed, ranks agreed. Begin with `bad_steps.py`."""
