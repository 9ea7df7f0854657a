"""`stratum replay`: one step of a run computed again, with statistics of every layer."""
