"""What a frozen encoder knows: nearest neighbours, linear and attentive probes, on clean and on attacked images.

An encoder is looked at as it is; nothing of it is trained. Features are computed once (`features.py`), each probe is a
file, `run.py` puts them together.
"""
