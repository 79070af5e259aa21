"""The agent, but taking any run of its ranks for long enough to count restarts anew."""

import sys

from papilio.trainer.elastic import agent

if __name__ == "__main__":
    agent.PROVEN_S = 0.0
    sys.exit(agent.main())
