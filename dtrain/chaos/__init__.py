"""A job that is killed, damaged and starved on purpose, again and again, and compared with the same job left alone."""
