"""What a sample's files become. Begin with `samples.py`: one sample's picture, label and arrays, or a BadSample.

`picture.py` decodes, crops and normalises; `check.py` says whether a data set has what a training reads; `headers.py`,
`exif.py`, `upright.py` and `survey.py` look at pictures without decoding them.
"""
