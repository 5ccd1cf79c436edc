"""`python -m benchmarks`: run cases, print tables, write lines and a picture. See the package's docstring."""

import sys

from benchmarks.cli import main

sys.exit(main())
