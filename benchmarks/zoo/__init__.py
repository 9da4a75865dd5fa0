"""Find, rewrite and compile the attention of many models and of random programs, and compare with eager mode.

The models and the generator of programs belong to the tests and are not installed: tests/support is put on the path.
"""

import sys
from pathlib import Path

SUPPORT = Path(__file__).parents[2] / "tests" / "support"
sys.path.insert(0, str(SUPPORT))
