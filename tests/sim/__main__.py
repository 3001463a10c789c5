"""``python -m tests.sim``: one seed with its trace, or many with a summary."""

import sys
from pathlib import Path

# As pytest has it: the packages of tests/ are found by their own names.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from sim.sweep import main

    sys.exit(main())
