"""What `dtrain init` writes: a first config that fits a data set and a machine.

Read propose.py first. source.py: where the data are, packed or indexed first where they must be; facts.py: what is
known of them and of the machine; choices.py: what follows from that; timing.py: how long it takes; text.py: the YAML.
"""
