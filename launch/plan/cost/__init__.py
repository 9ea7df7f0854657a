"""The cost model: memory, traffic and time of a step."""
