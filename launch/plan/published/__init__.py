"""Published throughput, as a benchmark of the planner."""
