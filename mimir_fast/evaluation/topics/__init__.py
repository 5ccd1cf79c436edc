"""The topics of the report, one file each: options, suites, measurements, numbers and picture (see topic.py)."""
