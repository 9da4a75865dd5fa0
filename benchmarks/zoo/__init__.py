"""Detection, rewriting and compilation of attention in many models and random programs, compared with eager mode.

The models and the generator of programs belong to the tests and are not installed: tests/support is added to the path.
"""

import sys
from pathlib import Path

SUPPORT = Path(__file__).parents[2] / "tests" / "support"
sys.path.insert(0, str(SUPPORT))
