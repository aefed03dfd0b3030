"""What a network is told beside x_t and t, and what it is told where nothing is to be said: the null condition.

Begin with `condition.py`, what every condition is; `classes.py` is the class label, `build.py` puts together what a
configuration asks for. In training a condition comes out of a batch, in sampling out of the ids of the images.
"""
