"""The evaluation room: is this robustness real? One file an idea; `suite.py` puts them together."""
