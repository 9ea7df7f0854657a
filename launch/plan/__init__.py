"""The planner: memory and time of a run, and its problems, before it starts."""
