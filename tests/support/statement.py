"""Runs the statement in its argument: a module for tests of how modules are started."""

import sys

exec(sys.argv[1])
